"""The ``mountctl`` command: its verbs, and the mounts that ``mounts.d`` declares."""
