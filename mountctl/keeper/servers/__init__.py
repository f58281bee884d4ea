"""A keeper's servers: the processes and the channels to them, where they come from, and when the next one starts."""
