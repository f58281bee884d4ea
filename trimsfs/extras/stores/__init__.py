"""Stores besides S3 and directories: clouds, the Hugging Face hub, OCI registries, and what fsspec knows."""
