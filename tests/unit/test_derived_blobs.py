"""Derived blobs: what programs pass on is found by others of the same user, whole or not at all."""

from functools import partial
from pathlib import Path

import pytest

from tests.support.parts import blob_files, flip_byte, until
from tests.support.served import OWNER, FakeBacking, Server, Serving, served
from tests.support.stores import MemoryStore
from trimsfs.errors import CacheFullError, InUseError, InvalidRequestError, NoSuchEntryError, ObjectChangedError
from trimsfs.extras.folding import derived_blobs
from trimsfs.extras.folding.derived_blobs import _PIECE, MOST_NUMBERS, PATIENCE_S, SLACK, Piece
from trimsfs.filesystem.handles import BACKING_SHIFT
from trimsfs.fuse import _libfuse

MODEL = "models/net/params"
UID = OWNER.uid
PIECE = 5000
CONTENT = bytes(range(256)) * 200
"""What is made of the model: some chunks and a bit."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived_blobs, "SMALLEST_MODEL", 1)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({MODEL: b"weights" * 10_000, "other": b"other" * 20_000})


@pytest.fixture
def serving(store: MemoryStore, backing: FakeBacking, tmp_path: Path, chunk_size: int) -> Serving:
    return partial(served, store, tmp_path / "cache", chunk_size=chunk_size, backing=backing)


def named(number: int = 0, uid: int = UID) -> str:
    """The path of a derived blob of the model."""
    return f"models/net/.trims/params/derived-{uid}-{number}"


def pieces(content: bytes = CONTENT, *, number: int = 0, uid: int = UID) -> list[Piece]:
    """The content in order."""
    return [
        Piece(uid=uid, number=number, size=len(content), offset=offset, data=content[offset : offset + PIECE])
        for offset in range(0, len(content), PIECE)
    ]


async def derive(server: Server, handle: int, piece: Piece) -> None:
    """Upload a piece."""
    data = _PIECE.pack(piece.size, piece.offset, len(piece.data), piece.number) + piece.data
    await server.filesystem.ioctls.answer(_libfuse.IOC_DERIVED, handle, piece.uid, 0, data)


async def pass_on(server: Server, content: bytes = CONTENT, *, path: str = MODEL, number: int = 0) -> None:
    """What a program does that has made something of a model."""
    handle = await server.open(path)
    for piece in pieces(content, number=number):
        await derive(server, handle, piece)
    server.release(handle)


async def absent(server: Server, path: str) -> bool:
    try:
        await server.find(path)
    except NoSuchEntryError:
        return True
    return False


async def test_what_was_passed_on_is_a_file_of_that_user(server: Server) -> None:
    assert await absent(server, named())
    await pass_on(server)
    attributes = await server.find(named())
    assert (attributes.size, attributes.ownership.uid, attributes.ownership.mode) == (len(CONTENT), UID, 0o400)
    handle = await server.open(named())
    assert handle >> BACKING_SHIFT, "not passed through"
    assert await server.read(handle) == CONTENT
    assert await absent(server, named(uid=UID + 1))
    assert await absent(server, named(number=1))
    assert (await server.find(MODEL)).ownership.mode == 0o444


async def test_what_is_not_whole_cannot_be_found(server: Server) -> None:
    handle = await server.open(MODEL)
    for piece in pieces()[:-1]:
        await derive(server, handle, piece)
    assert await absent(server, named())
    server.release(handle)
    assert await absent(server, named())
    await pass_on(server, CONTENT[::-1])
    assert await server.content(named()) == CONTENT[::-1]


async def test_pieces_come_in_order_and_from_one_program(server: Server) -> None:
    first, second, third, *_ = pieces()
    handle, other = await server.open(MODEL), await server.open(MODEL)
    for piece in (second, Piece(uid=UID, number=0, size=len(CONTENT), offset=0, data=b"")):
        with pytest.raises(InvalidRequestError):
            await derive(server, handle, piece)
    server.release(handle)
    handle = await server.open(MODEL)
    await derive(server, handle, first)
    with pytest.raises(InUseError):
        await derive(server, other, first)
    with pytest.raises(InvalidRequestError):
        await derive(server, other, second)
    with pytest.raises(InvalidRequestError):
        await derive(server, handle, third)
    for piece in pieces()[1:]:
        await derive(server, handle, piece)
    assert await server.content(named()) == CONTENT


@pytest.mark.parametrize(
    "piece",
    [
        Piece(uid=UID, number=MOST_NUMBERS, size=10, offset=0, data=b"0123456789"),
        Piece(uid=UID, number=0, size=70_001 + SLACK, offset=0, data=b"0123456789"),
        Piece(uid=UID, number=0, size=0, offset=0, data=b""),
        Piece(uid=UID, number=0, size=5, offset=0, data=b"0123456789"),
    ],
)
async def test_what_makes_no_sense_is_refused(server: Server, piece: Piece) -> None:
    handle = await server.open(MODEL)
    with pytest.raises(InvalidRequestError):
        await derive(server, handle, piece)
    assert await absent(server, named())


@pytest.mark.parametrize("how", ["stands still", "is slow for long"])
async def test_a_program_that_is_slow_makes_room(server: Server, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    slow = await server.open(MODEL)
    await derive(server, slow, pieces()[0])
    if how == "stands still":
        monkeypatch.setattr(derived_blobs, "PATIENCE_S", -1.0)
    else:
        monkeypatch.setattr(derived_blobs, "LEAST_RATE", -len(CONTENT) / PATIENCE_S / 2)
        await derive(server, slow, pieces()[1])
    await pass_on(server)
    with pytest.raises(InvalidRequestError):
        await derive(server, slow, pieces()[1])
    assert await server.content(named()) == CONTENT


async def test_what_is_there_stays_as_it_is(server: Server) -> None:
    await pass_on(server)
    with pytest.raises(InUseError):
        await pass_on(server, CONTENT[::-1])
    assert await server.content(named()) == CONTENT


async def test_another_generation_of_the_model_has_none(server: Server, store: MemoryStore) -> None:
    await pass_on(server)
    before = store.generation(MODEL)
    store.put(MODEL, b"new weights" * 8000)
    server.namespace.replaced(before)
    assert await absent(server, named())
    await pass_on(server, CONTENT[::-1])
    assert await server.content(named()) == CONTENT[::-1]


async def test_evicting_the_model_evicts_what_was_made_of_it(server: Server) -> None:
    await pass_on(server)
    await pass_on(server, path="other")
    assert (await server.outcome("evict", MODEL))[0] == "done"
    assert await absent(server, named())
    assert await server.content(f".trims/other/derived-{UID}-0") == CONTENT


async def test_it_outlives_the_server(serving: Serving) -> None:
    async with serving(backing=None) as server:
        await pass_on(server)
        handle = await server.open(MODEL)
        await derive(server, handle, pieces(number=1)[0])
    async with serving(backing=None) as server:
        assert await server.content(named()) == CONTENT
        assert await absent(server, named(number=1))


async def test_one_that_is_found_damaged_is_not_served(serving: Serving, tmp_path: Path) -> None:
    async with serving(backing=None) as server:
        await pass_on(server)
    (path,) = [path for path in blob_files(tmp_path / "cache") if path.stat().st_size == len(CONTENT)]
    flip_byte(path, 3)
    async with serving(backing=None) as server:
        with pytest.raises(ObjectChangedError):
            await server.content(named())
        assert await absent(server, named())
        await pass_on(server)
        assert await server.content(named()) == CONTENT


async def test_without_room_there_is_none(serving: Serving, chunk_size: int) -> None:
    async with serving(backing=None, cache_size=5 * chunk_size) as server:
        await server.content(MODEL)
        with pytest.raises(CacheFullError):
            await pass_on(server)  # the model itself is open
        assert await absent(server, named())
        assert (await server.content(MODEL)).startswith(b"weights")


async def test_what_did_not_come_whole_leaves_nothing(server: Server, tmp_path: Path) -> None:
    before = await server.disk.residencies.all()
    for _ in range(20):
        handle = await server.open(MODEL)
        for piece in pieces()[:-1]:
            await derive(server, handle, piece)
        server.release(handle)
        await until(lambda: len(blob_files(tmp_path / "cache")) == 1)
    assert len(await server.disk.residencies.all()) == max(1, len(before))


async def test_a_user_passes_on_one_at_a_time_and_hinders_no_other(server: Server) -> None:
    handle, other = await server.open(MODEL), await server.open("other")
    await derive(server, handle, pieces()[0])
    with pytest.raises(InUseError):
        await derive(server, other, pieces()[0])
    for piece in pieces(uid=UID + 1):
        await derive(server, other, piece)
    assert await server.content(f".trims/other/derived-{UID + 1}-0") == CONTENT


async def test_small_models_have_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived_blobs, "SMALLEST_MODEL", 1 << 20)
    with pytest.raises(InvalidRequestError):
        await pass_on(server)


async def test_what_only_looks_like_one_is_an_object(server: Server, store: MemoryStore) -> None:
    store.put("a.trims/params/derived-1-0", b"object")
    assert await server.content("a.trims/params/derived-1-0") == b"object"
    await server.derived.evicted(store.put("aparams", b"model"))
    assert await server.content("a.trims/params/derived-1-0") == b"object"
