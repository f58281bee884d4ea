"""The memory tier: the page cache of blobs, kept within a budget."""
