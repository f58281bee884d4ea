"""Engines: unchanged programs load their models by path, from a mount of S3 and from local files, in one run."""
