"""The disk tier: the cache directory, its budget, eviction and recovery after a crash."""
