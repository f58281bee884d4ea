"""The ``trimsfs`` command: renders what the mounts' control files give."""
