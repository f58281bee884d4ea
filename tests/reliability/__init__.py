"""Faults of the store, the disk, the host and the server, and what readers see of them."""
