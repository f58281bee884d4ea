"""Benchmarks of models on a GPU: ``python -m tests.benchmarks.gpu``, as root. They need a card."""
