"""nginx, which sends this host's chunks to the other members of its fleets: its configuration, check and reload."""
