"""The mountctl command: its verbs, and the mounts that are declared in mounts.d."""
