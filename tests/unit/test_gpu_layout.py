"""Where tensors lie on a device, and in what batches they get there; what may be asked for by name."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.extras.gpu.copy_requests import (
    CopyRequest,
    MemoryKind,
    device_of_attribute,
    matching,
    parse_request,
    parse_warm_command,
)
from trimsfs.extras.gpu.tier.layout import ALIGNMENT, Layout, lay_out
from trimsfs.formats import Tensor, TensorTable

DEVICE = "GPU-01234567-89ab-cdef-0123-456789abcdef"
BATCH = 4 * ALIGNMENT


def table(places: Iterable[tuple[int, int]], *, file: str | None = None) -> TensorTable:
    """A table of tensors of bytes at these offsets, of these sizes."""
    tensors = [Tensor(f"t{index}", "uint8", (size,), offset, size, file) for index, (offset, size) in enumerate(places)]
    return TensorTable("made", tuple(tensors))


def copied(layout: Layout, content: bytes, size: int) -> bytes:
    """What a device holds once all batches have been copied there, each byte at most once."""
    held = bytearray(layout.nbytes)
    written = bytearray(layout.nbytes)
    for batch in layout.batches(size):
        assert 0 < batch.length <= size
        assert batch.offset + batch.length <= layout.nbytes
        for run in batch.runs:
            at = run.start
            for part in run.parts:
                assert part.source == at
                assert batch.offset <= part.offset
                assert part.offset + part.length <= batch.offset + batch.length
                assert not any(written[part.offset : part.offset + part.length])
                held[part.offset : part.offset + part.length] = content[part.source : part.source + part.length]
                written[part.offset : part.offset + part.length] = b"\1" * part.length
                at += part.length
            assert at == run.stop
    return bytes(held)


sizes = st.integers(0, 3 * BATCH)


@given(st.lists(st.tuples(sizes, st.integers(0, 2 * BATCH)), max_size=12))
def test_every_tensor_is_copied_to_a_place_of_its_own_that_is_aligned(places: list[tuple[int, int]]) -> None:
    content = bytes(index * 7 % 251 for index in range(5 * BATCH))
    layout = lay_out(table(places), len(content))

    held = copied(layout, content, BATCH)
    assert [tensor.name for tensor in layout.tensors] == [f"t{index}" for index in range(len(places))]
    for tensor, (offset, size) in zip(layout.tensors, places, strict=True):
        alone = all(
            offset + size <= other or other + length <= offset for other, length in {*places} - {(offset, size)}
        )
        assert tensor.offset % ALIGNMENT == 0 or not alone
        assert held[tensor.offset : tensor.offset + size] == content[offset : offset + size]
    assert layout.nbytes <= len(content) + ALIGNMENT * len(places)


def test_tensors_that_are_one_share_their_bytes() -> None:
    layout = lay_out(table([(0, 100), (500, 10), (0, 100)]), 600)

    assert [tensor.offset for tensor in layout.tensors] == [0, ALIGNMENT, 0]
    assert layout.nbytes == ALIGNMENT + 10


def test_tensors_that_overlap_take_no_more_room_than_in_the_file() -> None:
    layout = lay_out(table([(begin, 1000) for begin in range(0, 1000, 4)]), 2000)

    assert [tensor.offset for tensor in layout.tensors] == list(range(0, 1000, 4))
    assert (layout.nbytes, len(layout.parts)) == (1996, 1)


def test_neighbours_in_the_file_come_in_one_run_and_one_batch() -> None:
    layout = lay_out(table([(index * 16, 16) for index in range(8)]), 128)
    (batch,) = layout.batches(8 * ALIGNMENT)

    assert len(batch.runs) == 1
    assert (batch.runs[0].start, batch.runs[0].stop) == (0, 128)


def test_a_file_of_no_known_format_is_an_image() -> None:
    layout = lay_out(None, 3 * BATCH + 5)

    assert (layout.format, layout.tensors, layout.nbytes) == (None, (), 3 * BATCH + 5)
    assert [batch.length for batch in layout.batches(BATCH)] == [BATCH, BATCH, BATCH, 5]
    assert list(lay_out(None, 0).batches(BATCH)) == []


def test_tensors_in_other_files_are_left_out() -> None:
    assert lay_out(table([(0, 10)], file="weights"), 100).tensors == ()


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        (DEVICE, CopyRequest(DEVICE)),
        (f"{DEVICE}.ipc", CopyRequest(DEVICE, MemoryKind.IPC)),
        (f"{DEVICE}@layers.0.*", CopyRequest(DEVICE, MemoryKind.VMM, "layers.0.*")),
        (f"{DEVICE}.ipc@a%2Fb%25", CopyRequest(DEVICE, MemoryKind.IPC, "a/b%")),
        (f"{DEVICE}@*", CopyRequest(DEVICE)),
        (DEVICE.replace("GPU", "MIG"), CopyRequest(DEVICE)),
        ("GPU-0", None),
        (DEVICE.upper(), None),
        (f"{DEVICE}@", None),
        (f"{DEVICE}.vmm", None),
        (f" {DEVICE}", None),
        (f"{DEVICE}\n", None),
    ],
)
def test_what_a_name_asks_for(name: str, asked: CopyRequest | None) -> None:
    assert parse_request(name) == asked
    assert parse_warm_command(f"warm-{name}") == (asked and (asked, None))
    assert parse_warm_command(f"warm-17~{name}") == (asked and (asked, 17))


def test_the_device_of_an_attribute() -> None:
    assert device_of_attribute(f"gpu.{DEVICE}.ipc_handle") == DEVICE
    assert device_of_attribute(f"gpu.{DEVICE}.vmm") is None


def test_tensors_are_chosen_by_pattern() -> None:
    tensors = table([(0, 1)] * 12).tensors
    assert [tensor.name for tensor in matching(tensors, "t1*")] == ["t1", "t10", "t11"]
    assert len(matching(tensors, None)) == 12
