"""What a call of the kernel means: lookup, open, read, release; free of FUSE."""
