"""Takeover: what a server leaves to the next one, and its end of the channel to the keeper."""
