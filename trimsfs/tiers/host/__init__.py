"""The memory tier: the page cache of the blobs, steered under a budget."""
