"""Serving chunks to the other members of a fleet: the requests of this host's nginx, and whose turn it is."""
