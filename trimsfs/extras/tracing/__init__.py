"""Traces of cold opens: the command that shows them, and their export to Chrome and OpenTelemetry."""
