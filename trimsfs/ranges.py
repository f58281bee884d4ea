"""Arithmetic of byte ranges and chunks."""

from trimsfs.types import CHUNK_SIZE


def chunk_count(size: int) -> int:
    """The number of chunks in an object of *size* bytes."""
    return -(-size // CHUNK_SIZE)


def chunk_span(chunk: int, size: int) -> tuple[int, int]:
    """The bytes ``[start, stop)`` of a chunk of an object of *size* bytes."""
    start = chunk * CHUNK_SIZE
    return start, min(start + CHUNK_SIZE, size)


def chunk_length(chunk: int, size: int) -> int:
    """The number of bytes in a chunk of an object of *size* bytes."""
    start, stop = chunk_span(chunk, size)
    return stop - start


def chunks_of(start: int, stop: int) -> range:
    """The chunks that hold the bytes ``[start, stop)``; none for an empty range."""
    if stop <= start:
        return range(0)
    return range(start // CHUNK_SIZE, chunk_count(stop))
