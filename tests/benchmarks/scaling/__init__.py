"""What grows, and by which power: the group ``scale`` of the benchmarks."""
