"""Keepers that follow a killed or stopped one: what it has left, and how they take its mount over."""
