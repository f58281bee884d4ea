"""The file system without FUSE: what lookup, open, read and release mean."""
