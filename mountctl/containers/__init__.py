"""Models of a mount in containers: those that run already, those that are made, and those that wait for a mount."""
