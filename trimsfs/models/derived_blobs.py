"""Derived blobs: what programs have made of a model in memory, kept for other programs of the same user.

A framework that rewrites weights in place makes the same bytes in every process. One process passes them on, piece by
piece, through an open file of the model; whole, they are the file ``.trims/FILE/derived-UID-NUMBER``, which only that
user may read and nobody can change. The others compare it with what they have made, and map it in its place.
"""

import logging
import os
import re
import secrets
import time
from dataclasses import dataclass, field

import trio

from trimsfs.checksums import crc32c
from trimsfs.concurrency.background import Background
from trimsfs.errors import CacheError, CacheFullError, InUseError, InvalidRequestError, NotPermittedError
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

MOST_NUMBERS = 4
"""Derived blobs of one user and generation: frameworks have a few states of the same weights."""
LEAST = 1 << 20
"""Bytes of the smallest model of which any is kept."""
SLACK = 64 << 10
"""Bytes that a derived blob may have more than its model: it tells what is where."""
UNDER_WAY = 8
"""Blobs that are being passed on at once, one for a user; each takes a chunk of memory."""
PATIENCE_S, LEAST_RATE = 10.0, 10e6
"""A program that has not gone on for so long, or passes on fewer bytes a second, makes room for another."""
REMOVE_TRIES, REMOVE_INTERVAL_S = 50, 0.1
_NAME = re.compile(r"derived-([0-9]{1,10})-([0-9])")
_KEY = re.compile(r"(|.*/)\.trims/([^/]+)/derived-[0-9]+-[0-9]", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """``data`` at ``offset`` of the ``size`` bytes of the derived blob ``number`` of user ``uid``."""

    uid: int
    number: int
    size: int
    offset: int
    data: bytes


@dataclass(slots=True, kw_only=True)
class _Arrival:
    """A derived blob that is being passed on: what has come and is not in the file yet, and where that begins."""

    key: str
    uid: int
    blob: Blob
    handle: int
    began: float
    last: float
    offset: int = 0
    data: bytearray = field(default_factory=bytearray)
    writing: bool = False

    @property
    def stale(self) -> bool:
        """Whether the program takes too long."""
        now, allowed_s = trio.current_time(), PATIENCE_S + self.blob.generation.size / LEAST_RATE
        return not self.writing and (now - self.last > PATIENCE_S or now - self.began > allowed_s)


class DerivedBlobs:
    """The derived blobs of the models of a mount, none when not *allowed*."""

    def __init__(self, disk: DiskTier, passthrough: Passthrough, *, allowed: bool) -> None:
        self._disk = disk
        self._passthrough = passthrough
        self._allowed = allowed
        self._known: dict[str, Generation] | None = None
        self._arriving: dict[str, _Arrival] = {}
        self._beginning = trio.Lock()
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Remove what has not come whole, for as long as the server runs."""
        await self._background.run(task_status)

    async def find(self, model: Generation, name: str) -> Generation | None:
        """The derived blob of this file name; None when there is none of the model's generation, or not all of it."""
        if not self._allowed or owner(name) is None:
            return None
        return await self._find(model, _key(model, name))

    async def of(self, model: Generation) -> list[Generation]:
        """All derived blobs of a file, those of its earlier generations included."""
        return [derived for key, derived in (await self._all()).items() if model_key(key) == model.key]

    async def take(self, model: Generation, handle: int, piece: Piece) -> None:
        """Take the next piece, through an open file of the model; with the last one the blob can be found.

        Raises NotPermittedError, InvalidRequestError, InUseError when it is there or on its way through another open
        file, and CacheFullError.
        """
        if not self._allowed:
            raise NotPermittedError("derived blobs are switched off by --no-derived")
        key = _key(model, f"derived-{piece.uid}-{piece.number}")
        arrival = self._arriving.get(key)
        if piece.offset == 0:
            arrival = await self._begin(model, key, handle, piece)
        elif arrival is None or arrival.handle != handle:
            raise InvalidRequestError(f"{key}: not begun, or taken over by another program")
        await self._add(arrival, piece)

    def closed(self, handle: int) -> None:
        """An open file has been closed: what has not come through it whole will not be kept."""
        for arrival in [arrival for arrival in self._arriving.values() if arrival.handle == handle]:
            self._give_up(arrival)

    async def _begin(self, model: Generation, key: str, handle: int, piece: Piece) -> _Arrival:
        sizes = model.size >= LEAST and 0 < piece.size <= model.size + SLACK
        if not sizes or piece.number >= MOST_NUMBERS:
            raise InvalidRequestError(f"{key}: {piece.size} bytes, or too many of the kind")
        async with self._beginning:
            for known in list(self._arriving.values()):
                if known.stale:
                    self._give_up(known)
            busy = any(piece.uid == known.uid for known in self._arriving.values())
            if busy or len(self._arriving) >= UNDER_WAY or await self._find(model, key) is not None:
                raise InUseError(f"{key} is there, or another is on its way")
            etag = f"{_identity(model)}-{secrets.token_hex(8)}"  # another content is another inode
            generation = Generation(key=key, etag=etag, size=piece.size, modified_ns=time.time_ns())
            blob, now = await self._disk.acquire(generation), trio.current_time()
            arrival = self._arriving[key] = _Arrival(
                key=key, uid=piece.uid, blob=blob, handle=handle, began=now, last=now
            )
            return arrival

    async def _add(self, arrival: _Arrival, piece: Piece) -> None:
        blob, size = arrival.blob, arrival.blob.generation.size
        here = arrival.offset + len(arrival.data)
        end = piece.offset + len(piece.data)
        room = blob.chunk_size - len(arrival.data)
        in_order = piece.size == size and piece.offset == here < end <= size and not arrival.writing
        if not in_order:
            raise InvalidRequestError(f"{arrival.key}: a piece out of order")
        arrival.last = trio.current_time()
        arrival.data += piece.data[:room]
        if len(arrival.data) < blob.chunk_size and end < size:
            return
        arrival.writing = True
        blob.users += 1  # whatever becomes of the open file meanwhile
        try:
            await self._write(arrival)
            arrival.data += piece.data[room:]
            if end == size:
                if arrival.data:
                    await self._write(arrival)
                await self._complete(arrival)
        except BaseException:
            self._give_up(arrival)
            raise
        finally:
            arrival.writing = False
            self._disk.release(blob)

    async def _write(self, arrival: _Arrival) -> None:
        """Write a chunk to the file."""
        blob, data = arrival.blob, bytes(arrival.data)
        if not await self._disk.reserve(blob, len(data)):
            raise CacheFullError(f"{arrival.key}: no room in the cache")
        try:
            crc = await trio.to_thread.run_sync(_write, blob, data, arrival.offset)
        except OSError as error:
            await self._disk.write_failed(blob, len(data), error, last=True)
            raise CacheFullError(f"{arrival.key}: {error.strerror}") from error
        self._disk.wrote(blob, ChunkRecord(chunk=arrival.offset // blob.chunk_size, length=len(data), crc=crc))
        arrival.offset += len(data)
        arrival.data.clear()

    async def _complete(self, arrival: _Arrival) -> None:
        (await self._all())[arrival.key] = arrival.blob.generation
        await self._passthrough.register(arrival.blob)
        log.info("/%s: %d bytes", arrival.key, arrival.blob.generation.size)
        self._give_up(arrival)

    def _give_up(self, arrival: _Arrival) -> None:
        """Nothing more comes; what is not whole is removed."""
        if self._arriving.get(arrival.key) is arrival:
            del self._arriving[arrival.key]
            self._disk.release(arrival.blob)
            if not arrival.blob.complete and self._background.running:
                self._background.start(self._remove, arrival.blob.generation)

    async def _remove(self, generation: Generation) -> None:
        for _ in range(REMOVE_TRIES):
            try:
                await self._disk.evict(generation)
            except InUseError:
                await trio.sleep(REMOVE_INTERVAL_S)  # a chunk is still being written, or synced
            except CacheError as error:
                log.warning("%s: not removed: %s", generation.key, error)
                return
            else:
                return

    async def _find(self, model: Generation, key: str) -> Generation | None:
        known = await self._all()
        derived = known.get(key)
        if derived is None or not derived.etag.startswith(f"{_identity(model)}-"):
            return None
        here = await self._disk.residency(derived)
        if here.disk_bytes == derived.size:
            return derived
        if known.get(key) is derived:
            del known[key]  # evicted, or found damaged
        return None

    async def _all(self) -> dict[str, Generation]:
        """By key, what was here when the server started and what has come since."""
        if self._known is None:
            found: dict[str, Generation] = {}
            for here in await self._disk.residencies():
                generation = here.generation
                latest = found.get(generation.key)
                whole = _KEY.fullmatch(generation.key) and here.disk_bytes == generation.size
                if whole and (latest is None or latest.modified_ns < generation.modified_ns):
                    found[generation.key] = generation
            self._known = self._known or found
        return self._known


def owner(name: str) -> int | None:
    """The user whose derived blob has this file name; None when it is no such name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def _identity(model: Generation) -> str:
    return model.token("")


def _key(model: Generation, name: str) -> str:
    """The key of a derived blob: no object is shown below a ``.trims``."""
    prefix, slash, file = model.key.rpartition("/")
    return f"{prefix}{slash}.trims/{file}/{name}"


def model_key(key: str) -> str | None:
    """The key of the model that a derived blob is of; None for what is no key of one: no store has any."""
    match = _KEY.fullmatch(key)
    return f"{match[1]}{match[2]}" if match else None


def _write(blob: Blob, data: bytes, offset: int) -> int:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(blob.fileno(), rest, offset)
        rest, offset = rest[count:], offset + count
    return crc32c(data)
