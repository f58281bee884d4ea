"""Opening: passthrough, cold opens that wait, and opens that the kernel tries again."""
