"""The GPU tier: copies of models in the memory of devices, under a budget each. Knows nothing of stores or of FUSE."""
