"""A fork server: runs in the program's own interpreter, of any environment, and needs the standard library alone."""
