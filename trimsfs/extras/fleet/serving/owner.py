"""An owner's answer to a request for chunks: which bytes nginx may send, once they are here and verified."""

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

from cachetools import TTLCache

from trimsfs.errors import ObjectChangedError, StoreError, StoreUnavailableError, TransientStoreError, TrimsError
from trimsfs.extras.fleet.protocol import (
    AWAY_S,
    CHUNKS_LIMIT,
    CRCS,
    HOLDERS,
    RETRY_AFTER,
    ChunkRequest,
    ProtocolError,
    fleet_token,
    format_crcs,
    parse_request,
)
from trimsfs.extras.fleet.serving.http_server import Answer, Request
from trimsfs.extras.fleet.serving.uploads import BusyError, Uploads
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.listing import possible
from trimsfs.namespace.tree import Namespace
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import Inspection
from trimsfs.types import Generation

log = logging.getLogger(__name__)

BLOBS = "/blobs"
"""Where nginx has the directory of blobs, for redirects of this server only."""
RECENT_S = 1.0
"""How old an answer of the store may be that contradicts an asker."""
KEYS_LOGGED, LOGGED_EVERY_S = 64, 60.0
"""Of how many keys, and how often, the log tells that they cannot be given."""
_GROUP_READS, _GROUP_ENTERS = stat.S_IRGRP, stat.S_IRGRP | stat.S_IXGRP

BAD_REQUEST, MISSING, OTHER_GENERATION, ITSELF, BUSY = (Answer(status=status) for status in (400, 404, 409, 421, 503))
AWAY = Answer(status=503, headers={RETRY_AFTER: str(AWAY_S)})


class Owner:
    """Answers the members of a *fleet* from a cache *directory*. *serving* tells whether it should; *instance* is this
    server's own."""

    def __init__(
        self,
        fleet: str,
        namespace: Namespace,
        blobs: Inspection,
        fetcher: Fetcher,
        uploads: Uploads,
        *,
        directory: Path,
        chunk_size: int,
        serving: Callable[[], bool],
        instance: str,
    ) -> None:
        self._fleet = fleet
        self._namespace = namespace
        self._blobs = blobs
        self._directory = directory
        self._chunk_size = chunk_size
        self._fetcher = fetcher
        self._uploads = uploads
        self._serving = serving
        self._instance = instance
        self._logged: TTLCache[str, None] = TTLCache(KEYS_LOGGED, LOGGED_EVERY_S)

    async def answer(self, request: Request) -> Answer:
        """The answer to a request that nginx passes on: a redirect to the blob, or why there is none."""
        try:
            wanted = parse_request(request.target, request.headers)
        except ProtocolError:
            return BAD_REQUEST if self._serving() else AWAY  # `trimsfs doctor` asks so
        if wanted.fleet != self._fleet or not _is_path(wanted.key):
            return BAD_REQUEST
        if wanted.instance == self._instance:
            return ITSELF
        if not self._serving():
            return AWAY
        if wanted.cached_only and request.method == "HEAD":
            return MISSING  # the asker wants to know whether anybody is here, and must not wait for the store
        try:
            generation = await self._generation(wanted)
            if generation is None:
                return OTHER_GENERATION
            inspecting = self._blobs.inspecting_cached if wanted.cached_only else self._blobs.inspecting
            async with inspecting(generation) as blob:
                return MISSING if blob is None else await self._answer(wanted, blob, sends=request.method == "GET")
        except ObjectChangedError:
            return OTHER_GENERATION
        except (StoreUnavailableError, TransientStoreError):
            return BUSY  # perhaps the store is away for all, and askers must not all turn to it at once
        except (TrimsError, OSError) as error:
            if not isinstance(error, StoreError) and wanted.key not in self._logged:  # else the fetcher has logged it
                self._logged[wanted.key] = None
                log.warning("%s: not given to the fleet: %s", wanted.key, error)
            return MISSING

    async def _generation(self, wanted: ChunkRequest) -> Generation | None:
        """The generation that an asker means, if this host's store has it. Raises StoreError.

        What the store last told suffices: a token names a content, which does not change. So an owner need not ask a
        store that does not answer.
        """
        prefix, slash, name = wanted.key.rpartition("/")
        directory, encoded = prefix + slash, os.fsencode(name)
        entry = self._namespace.latest(directory, encoded)
        if not self._is_meant(wanted, entry):
            entry, _ = await self._namespace.lookup(directory, encoded)
        if not self._is_meant(wanted, entry):
            entry = await self._namespace.recent(directory, encoded, RECENT_S)
        return entry if isinstance(entry, Generation) and self._is_meant(wanted, entry) else None

    def _is_meant(self, wanted: ChunkRequest, entry: object) -> bool:
        return isinstance(entry, Generation) and fleet_token(self._fleet, entry, self._chunk_size) == wanted.token

    async def _answer(self, wanted: ChunkRequest, blob: Blob, *, sends: bool) -> Answer:
        """Raises TrimsError and OSError."""
        chunks = blob.chunks_of(wanted.start, wanted.stop)
        if wanted.start % blob.chunk_size or wanted.stop > blob.generation.size or len(chunks) > CHUNKS_LIMIT:
            return BAD_REQUEST
        if wanted.stop % blob.chunk_size and wanted.stop != blob.generation.size:
            return BAD_REQUEST
        if not wanted.cached_only:
            await self._fetcher.fetch_for_others(blob, chunks)
        elif not await self._fetcher.are_here(blob, chunks):
            return MISSING
        headers = {CRCS: format_crcs([blob.crc(chunk) for chunk in chunks])}
        if not sends:
            return Answer(status=200, headers=headers)
        _permit(blob.fileno(), _GROUP_READS)  # nginx's workers are in the server's group
        _permit(self._directory / "blobs" / blob.token[:2], _GROUP_ENTERS)
        try:
            number = await self._uploads.turn((blob.token, chunks[0]), wanted.stop - wanted.start, wanted.asker)
        except BusyError as busy:
            return Answer(status=BUSY.status, headers={HOLDERS: ",".join(busy.holders)} if busy.holders else {})
        if self._uploads.limit is not None:
            headers["x-accel-limit-rate"] = str(self._uploads.limit)
        headers["x-accel-redirect"] = f"{BLOBS}/{blob.token[:2]}/{blob.token}?upload={number}"
        return Answer(status=200, headers=headers)

    def let_nginx_in(self) -> None:
        """Let the server's group into the cache directory. Raises OSError."""
        _permit(self._directory, stat.S_IXGRP)
        _permit(self._directory / "blobs", stat.S_IXGRP)


def _permit(file: int | Path, bits: int) -> None:
    mode = stat.S_IMODE(os.stat(file).st_mode)
    if mode & bits != bits:
        os.chmod(file, mode | bits)


def _is_path(key: str) -> bool:
    """Whether a key is one that the mount may show."""
    return all(possible(os.fsencode(part)) for part in key.split("/"))
