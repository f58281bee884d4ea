"""The ``trimsfs`` command: what a user types, and how the mounts' answers are shown."""
