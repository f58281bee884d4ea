from hypothesis import given
from hypothesis import strategies as st

from trimsfs.tiers.ranges import chunk_count, chunk_length, chunk_span, chunks_of
from trimsfs.types import CHUNK_SIZE

SIZES = st.one_of(
    st.integers(0, 1 << 50),
    # Around the boundaries of chunks.
    st.builds(lambda chunks, more: max(0, chunks * CHUNK_SIZE + more), st.integers(0, 10_000), st.integers(-2, 2)),
)


@given(SIZES.map(lambda size: size % (200 * CHUNK_SIZE)))
def test_chunks_tile_the_object_and_only_the_last_is_shorter(size: int) -> None:
    position = 0
    for chunk in range(chunk_count(size, CHUNK_SIZE)):
        start, stop = chunk_span(chunk, size, CHUNK_SIZE)
        assert start == position == chunk * CHUNK_SIZE
        assert 0 < stop - start == chunk_length(chunk, size, CHUNK_SIZE) <= CHUNK_SIZE
        position = stop
    assert position == size


@given(SIZES, SIZES)
def test_chunks_of_a_range_are_those_that_overlap_it(start: int, stop: int) -> None:
    chunks = chunks_of(start, stop, CHUNK_SIZE)
    if start >= stop:
        assert not chunks
        return
    assert chunks[0] * CHUNK_SIZE <= start < (chunks[0] + 1) * CHUNK_SIZE
    assert chunks[-1] * CHUNK_SIZE < stop <= (chunks[-1] + 1) * CHUNK_SIZE
