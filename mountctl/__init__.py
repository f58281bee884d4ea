"""Owns the mounts: the small privileged part beside the servers."""
