"""Benchmarks of trimsfs beside a local file, rclone and s3fs: ``python -m tests.benchmarks``, as root."""
