"""Tests that load models by path with real frameworks, each in a process of its own."""

from pathlib import Path

PROGRAMS = Path(__file__).with_name("programs")
