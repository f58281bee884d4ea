"""The control surface: extended attributes, control files, commands and metrics."""
