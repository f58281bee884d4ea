"""The index: the SQLite record of blobs, the journal that fills it, and its recovery."""
