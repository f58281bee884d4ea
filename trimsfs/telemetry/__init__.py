"""Telemetry: latency histograms, counters of each model, and traces of cold opens."""
