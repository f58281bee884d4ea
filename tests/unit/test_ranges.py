from hypothesis import given
from hypothesis import strategies as st

from trimsfs.tiers.ranges import chunk_count, chunk_length, chunk_span, chunks_of
from trimsfs.types import CHUNK_SIZE

SIZES = st.one_of(
    st.integers(0, 1 << 50),
    # Around the boundaries of chunks.
    st.builds(lambda chunks, more: max(0, chunks * CHUNK_SIZE + more), st.integers(0, 10_000), st.integers(-2, 2)),
)
FEW_CHUNKS = SIZES.map(lambda size: size % (200 * CHUNK_SIZE))


@given(FEW_CHUNKS)
def test_chunks_tile_the_object(size: int) -> None:
    spans = [chunk_span(chunk, size, CHUNK_SIZE) for chunk in range(chunk_count(size, CHUNK_SIZE))]
    position = 0
    for start, stop in spans:
        assert start == position
        assert start < stop <= start + CHUNK_SIZE
        position = stop
    assert position == size


@given(SIZES.filter(bool))
def test_only_the_last_chunk_is_shorter(size: int) -> None:
    last = chunk_count(size, CHUNK_SIZE) - 1
    assert chunk_length(last, size, CHUNK_SIZE) == (size % CHUNK_SIZE or CHUNK_SIZE)
    if last > 0:
        assert chunk_length(0, size, CHUNK_SIZE) == chunk_length(last - 1, size, CHUNK_SIZE) == CHUNK_SIZE


def test_an_empty_object_has_no_chunks() -> None:
    assert chunk_count(0, CHUNK_SIZE) == 0


@given(SIZES, SIZES)
def test_chunks_of_a_range_are_those_that_overlap_it(one: int, other: int) -> None:
    start, stop = sorted((one, other))
    chunks = chunks_of(start, stop, CHUNK_SIZE)
    if start == stop:
        assert not chunks
        return
    assert chunks[0] * CHUNK_SIZE <= start < (chunks[0] + 1) * CHUNK_SIZE
    assert chunks[-1] * CHUNK_SIZE < stop <= (chunks[-1] + 1) * CHUNK_SIZE


@given(SIZES, SIZES)
def test_a_reversed_range_has_no_chunks(one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert not chunks_of(high, low, CHUNK_SIZE)
