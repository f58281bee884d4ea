"""The server process: its sandbox, its components put together, and its lifecycle."""
