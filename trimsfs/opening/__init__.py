"""Opening files: passthrough of resident ones, cold opens that wait, and reopens after ESTALE."""
