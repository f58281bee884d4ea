"""Chunks of a few bytes, so that objects of many chunks stay small."""

SMALL_CHUNK = 16 * 1024
REQUESTS_PER_CHUNK = 4
"""Requests whose memory is that of a chunk, as it is in production."""
