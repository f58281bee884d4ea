"""Fetch processes: they move bytes for the server, so that its event loop has a core and the GIL to itself."""
