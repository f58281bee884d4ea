"""Runs unchanged Python programs in forks of processes that have imported their libraries already."""
