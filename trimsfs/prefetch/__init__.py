"""Prefetching: what is fetched before anybody asks for it."""
