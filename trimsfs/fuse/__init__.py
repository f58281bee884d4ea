"""The kernel's side: the only home of pyfuse3."""
