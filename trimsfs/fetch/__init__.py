"""Fetching: missing chunks come from the store, once each, however many readers wait."""
