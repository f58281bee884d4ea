"""The keeper: the process that owns a mount, holds what outlives a server, and starts and replaces servers."""
