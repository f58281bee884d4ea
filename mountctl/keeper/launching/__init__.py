"""Servers that are started elsewhere, as in another container: their launcher, and the keeper that waits for it."""
