"""Integrity: comparing whole objects with their digests, repair, quarantine, signatures."""
