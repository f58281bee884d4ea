"""Stores: where models come from, behind one protocol: S3, a directory, and those of extras; layouts; retries."""
