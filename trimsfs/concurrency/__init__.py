"""Concurrency tools that know nothing of files: background tasks, a message channel, an adaptive limit."""
