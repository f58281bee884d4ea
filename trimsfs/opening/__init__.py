"""Opening files: passthrough of resident ones, cold opens that wait, and reopens of replaced ones."""
