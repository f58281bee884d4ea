"""Models of an object store as ordinary files, one shared copy per host."""

__version__ = "0.1.0.dev0"
