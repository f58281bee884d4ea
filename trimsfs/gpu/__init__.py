"""Copies of models on GPUs: loaded once, lent to programs by path, gone on with by another server."""
