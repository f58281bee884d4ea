"""The server process: its sandbox, its assembly from components, and its lifecycle."""
