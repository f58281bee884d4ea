"""The exporter: metrics of all mounts of a host over HTTP, and a status page."""
