"""Versions: what publishers do to the versions and aliases of a model in a store."""
