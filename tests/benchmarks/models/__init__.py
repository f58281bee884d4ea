"""First loads of whole models by real programs: from downloads, from trimsfs, and from other mounts."""
