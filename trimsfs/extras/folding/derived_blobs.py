"""Derived blobs: bytes that programs computed from a model in memory, kept for other programs of the same user.

A framework that rewrites weights in place makes the same bytes in every process. One process uploads them in pieces
through the model's open file. A complete upload becomes the file ``.trims/FILE/derived-UID-NUMBER``, which only that
user may read and nobody can change. Other processes compare it with their own bytes, and map it where both are equal.
"""

import logging
import os
import secrets
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from trimsfs.checksums import crc32c
from trimsfs.concurrency.background import Background
from trimsfs.concurrency.in_thread import in_thread
from trimsfs.control.extra import Extra, IoctlRequest
from trimsfs.errors import CacheError, CacheFullError, InUseError, InvalidRequestError, NotPermittedError
from trimsfs.fuse import _libfuse
from trimsfs.namespace.derived import derived_key, model_key, owner
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse, ChunkWrites, Retention
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

MOST_NUMBERS = 4
"""Derived blobs of one user and generation: frameworks have a few states of the same weights."""
SMALLEST_MODEL = 1 << 20
"""Bytes of the smallest model that may have derived blobs."""
SLACK = 64 << 10
"""Bytes by which a derived blob may exceed its model, for its table of ranges."""
MOST_UPLOADS = 8
"""Concurrent uploads, at most one for each user; each buffers a chunk in memory."""
PATIENCE_S, LEAST_RATE = 10.0, 10e6
"""Another program may replace an upload that pauses for longer, or sends fewer bytes a second."""
REMOVE_TRIES, REMOVE_INTERVAL_S = 50, 0.1
_PIECE = struct.Struct("=QQII")
"""The fields before the data in a ``struct trimsfs_piece``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """``data`` at ``offset`` of the ``size`` bytes of the derived blob ``number`` of user ``uid``."""

    uid: int
    number: int
    size: int
    offset: int
    data: bytes


@dataclass(slots=True, kw_only=True)
class _Upload:
    """An upload of a derived blob: ``data`` has arrived and is still to be written at ``offset`` of the file."""

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
        """Whether the program is too slow, so that another may replace it."""
        now, allowed_s = trio.current_time(), PATIENCE_S + self.blob.generation.size / LEAST_RATE
        return not self.writing and (now - self.last > PATIENCE_S or now - self.began > allowed_s)


class DerivedBlobs(Extra):
    """The derived blobs of a mount; none unless *allowed*."""

    def __init__(
        self, blobs: BlobUse, writes: ChunkWrites, retention: Retention, passthrough: Passthrough, *, allowed: bool
    ) -> None:
        self._blobs = blobs
        self._writes = writes
        self._retention = retention
        self._passthrough = passthrough
        self._allowed = allowed
        self._known: dict[str, Generation] | None = None
        self._uploads: dict[str, _Upload] = {}
        self._begin_lock = trio.Lock()
        self._background = Background()
        self.services = (self.run,)
        self.ioctls = {_libfuse.IOC_DERIVED: self._take_piece}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Remove incomplete blobs, until the server ends."""
        await self._background.run(task_status)

    async def find(self, model: Generation, name: str) -> Generation | None:
        """The derived blob with this file name; None unless a complete one of the model's generation exists."""
        if not self._allowed or owner(name) is None:
            return None
        return await self._find(model, derived_key(model, name))

    async def evicted(self, generation: Generation) -> None:
        """Evict all derived blobs of a file, including those of earlier generations."""
        for derived in [each for key, each in (await self._all()).items() if model_key(key) == generation.key]:
            with suppress(InUseError):  # programs use it: the evictor removes it later
                await self._retention.evict(derived)

    async def _take_piece(self, request: IoctlRequest) -> bytes:
        """Take a piece of a blob derived from an open file."""
        if request.derived:
            raise InvalidRequestError("not a model's file")
        size, offset, length, number = _PIECE.unpack_from(request.data)
        content = request.data[_PIECE.size : _PIECE.size + length]
        piece = Piece(uid=request.uid, number=number, size=size, offset=offset, data=content)
        await self.take(request.generation, request.handle, piece)
        return b""

    async def take(self, model: Generation, handle: int, piece: Piece) -> None:
        """Accept the next piece of an upload through an open file of the model; the last one completes the blob.

        Raises NotPermittedError, InvalidRequestError, InUseError when the blob exists or is being uploaded through
        another open file, and CacheFullError.
        """
        if not self._allowed:
            raise NotPermittedError("derived blobs: derived = false disables them on this mount")
        key = derived_key(model, f"derived-{piece.uid}-{piece.number}")
        upload = self._uploads.get(key)
        if piece.offset == 0:
            upload = await self._begin(model, key, handle, piece)
        elif upload is None or upload.handle != handle:
            raise InvalidRequestError(f"{key}: no upload has begun, or another program has replaced it: begin again")
        await self._add(upload, piece)

    def closed(self, handle: int) -> None:
        """Discard the incomplete uploads of a closed file."""
        for upload in [upload for upload in self._uploads.values() if upload.handle == handle]:
            self._give_up(upload)

    async def _begin(self, model: Generation, key: str, handle: int, piece: Piece) -> _Upload:
        sizes = model.size >= SMALLEST_MODEL and 0 < piece.size <= model.size + SLACK
        if not sizes or piece.number >= MOST_NUMBERS:
            raise InvalidRequestError(f"{key}: {piece.size} bytes, or number {piece.number}, exceed the limits")
        async with self._begin_lock:
            for known in list(self._uploads.values()):
                if known.stale:
                    self._give_up(known)
            busy = any(piece.uid == known.uid for known in self._uploads.values())
            if busy or len(self._uploads) >= MOST_UPLOADS or await self._find(model, key) is not None:
                raise InUseError(f"{key} exists, or another upload is running")
            etag = f"{_identity(model)}-{secrets.token_hex(8)}"  # each upload gets an inode of its own
            generation = Generation(key=key, etag=etag, size=piece.size, modified_ns=time.time_ns())
            blob, now = await self._blobs.acquire(generation), trio.current_time()
            upload = self._uploads[key] = _Upload(key=key, uid=piece.uid, blob=blob, handle=handle, began=now, last=now)
            return upload

    async def _add(self, upload: _Upload, piece: Piece) -> None:
        blob, size = upload.blob, upload.blob.generation.size
        here = upload.offset + len(upload.data)
        end = piece.offset + len(piece.data)
        room = blob.chunk_size - len(upload.data)
        in_order = piece.size == size and piece.offset == here < end <= size and not upload.writing
        if not in_order:
            raise InvalidRequestError(f"{upload.key}: pieces must come in order")
        upload.last = trio.current_time()
        upload.data += piece.data[:room]
        if len(upload.data) < blob.chunk_size and end < size:
            return
        upload.writing = True
        blob.users += 1  # keeps the blob even if the program closes the file meanwhile
        try:
            await self._write(upload)
            upload.data += piece.data[room:]
            if end == size:
                if upload.data:
                    await self._write(upload)
                await self._complete(upload)
        except BaseException:
            self._give_up(upload)
            raise
        finally:
            upload.writing = False
            self._blobs.release(blob)

    async def _write(self, upload: _Upload) -> None:
        """Write the buffered chunk to the blob's file."""
        blob, data = upload.blob, bytes(upload.data)
        if not await self._writes.reserve(blob, len(data)):
            raise CacheFullError(f"{upload.key}: the cache is full")
        try:
            crc = await in_thread(_write, blob, data, upload.offset)
        except OSError as error:
            await self._writes.write_failed(blob, len(data), error, last=True)
            raise CacheFullError(f"{upload.key}: {error.strerror}") from error
        self._writes.wrote(blob, ChunkRecord(chunk=upload.offset // blob.chunk_size, length=len(data), crc=crc))
        upload.offset += len(data)
        upload.data.clear()

    async def _complete(self, upload: _Upload) -> None:
        (await self._all())[upload.key] = upload.blob.generation
        await self._passthrough.register(upload.blob)
        log.info("/%s: a program uploaded %d bytes", upload.key, upload.blob.generation.size)
        self._give_up(upload)

    def _give_up(self, upload: _Upload) -> None:
        """End an upload, and remove an incomplete blob."""
        if self._uploads.get(upload.key) is upload:
            del self._uploads[upload.key]
            self._blobs.release(upload.blob)
            if not upload.blob.complete and self._background.running:
                self._background.start(self._remove, upload.blob.generation)

    async def _remove(self, generation: Generation) -> None:
        for _ in range(REMOVE_TRIES):
            try:
                await self._retention.evict(generation)
            except InUseError:
                await trio.sleep(REMOVE_INTERVAL_S)  # a chunk is still being written, or synced
            except CacheError as error:
                log.warning("/%s: the incomplete blob is not removed: %s", generation.key, error)
                return
            else:
                return

    async def _find(self, model: Generation, key: str) -> Generation | None:
        known = await self._all()
        derived = known.get(key)
        if derived is None or not derived.etag.startswith(f"{_identity(model)}-"):
            return None
        here = await self._retention.of(derived)
        if here.disk_bytes == derived.size:
            return derived
        if known.get(key) is derived:
            del known[key]  # evicted, or corrupt
        return None

    async def _all(self) -> dict[str, Generation]:
        """All complete derived blobs, by key."""
        if self._known is None:
            complete: dict[str, Generation] = {}
            for here in await self._retention.all():
                generation = here.generation
                latest = complete.get(generation.key)
                whole = model_key(generation.key) is not None and here.disk_bytes == generation.size
                if whole and (latest is None or latest.modified_ns < generation.modified_ns):
                    complete[generation.key] = generation
            self._known = self._known or complete
        return self._known


def _identity(model: Generation) -> str:
    return model.token("")


def _write(blob: Blob, data: bytes, offset: int) -> int:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(blob.fileno(), rest, offset)
        rest, offset = rest[count:], offset + count
    return crc32c(data)
