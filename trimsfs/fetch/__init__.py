"""Fetching: how missing chunks come from the store, once each, whoever waits."""
