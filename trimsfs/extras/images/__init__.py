"""Images for microVMs: guests map the mount's own files."""
