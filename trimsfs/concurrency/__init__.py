"""Concurrency tools that know nothing of files: background tasks, late answers, a channel, an adaptive limit."""
