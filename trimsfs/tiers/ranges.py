"""Arithmetic of byte ranges and of the chunks that objects are fetched in."""


def chunk_count(size: int, chunk_size: int) -> int:
    """The number of chunks in an object of *size* bytes."""
    return -(-size // chunk_size)


def chunk_span(chunk: int, size: int, chunk_size: int) -> tuple[int, int]:
    """The bytes ``[start, stop)`` of a chunk of an object of *size* bytes."""
    start = chunk * chunk_size
    return start, min(start + chunk_size, size)


def chunk_length(chunk: int, size: int, chunk_size: int) -> int:
    """The number of bytes in a chunk of an object of *size* bytes."""
    start, stop = chunk_span(chunk, size, chunk_size)
    return stop - start


def chunks_of(start: int, stop: int, chunk_size: int) -> range:
    """The chunks that hold the bytes ``[start, stop)``; none for an empty range."""
    if stop <= start:
        return range(0)
    return range(start // chunk_size, chunk_count(stop, chunk_size))
