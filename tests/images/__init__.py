"""Images for microVMs: what Linux finds in them, and what guests and hosts share."""
