"""MXNet's own loaders, mapped instead of copied."""
