"""Benchmarks of trimsfs beside local files, downloads and other mounts: ``python -m tests.benchmarks``, as root."""
