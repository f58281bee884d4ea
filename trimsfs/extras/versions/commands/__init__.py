"""The commands that publish, list, compare and remove versions."""
