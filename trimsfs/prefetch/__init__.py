"""Prefetching: the server fetches what a program is about to open."""
