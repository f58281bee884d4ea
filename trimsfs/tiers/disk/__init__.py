"""The disk tier: blobs in a cache directory, their budget, eviction and recovery after a crash."""
