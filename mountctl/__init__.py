"""The keeper and its commands: the small privileged program that owns mounts and starts their servers."""
