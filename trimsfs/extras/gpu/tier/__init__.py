"""The GPU tier: copies of models in device memory, each device under a budget."""
