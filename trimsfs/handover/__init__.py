"""Takeover: what a server leaves to its successor, and the server's end of the channel to the keeper."""
