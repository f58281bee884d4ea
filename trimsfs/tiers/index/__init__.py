"""The index: what is recorded of the blobs in SQLite, its journal and its recovery."""
