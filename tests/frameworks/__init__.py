"""Tests that load models by path with real frameworks, each in a process of its own."""
