"""A store in memory, for tests: it counts what it is asked, and waits, fails and changes its objects on demand."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import trio

from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, StoreAccessError, StoreError
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, Store
from trimsfs.stores.digests import Digest
from trimsfs.types import Generation, Symlink

PIECE = 5000
"""Bytes passed on at a time: chunks are no multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A call of the store. ``key`` is the key or the prefix; ``offset`` and ``length`` are those of a read."""

    method: str
    key: str = ""
    offset: int = 0
    length: int = 0
    version_id: str | None = None


class Match(TypedDict, total=False):
    """The requests that a rule applies to, as of `_Rule`."""

    method: str | None
    key: str | None
    offset: int | None
    after: int
    times: float


@dataclass(slots=True, kw_only=True)
class _Rule:
    """Applies to the requests that it matches, *times* of them; None matches everything.

    To a read it applies once *after* bytes have been passed on.
    """

    method: str | None = None
    key: str | None = None
    offset: int | None = None
    after: int = 0
    times: float = float("inf")
    error: StoreError | None = None
    gate: trio.Event | None = None
    delay_s: float = 0.0

    def matches(self, request: Request) -> bool:
        return (
            self.times > 0
            and self.method in {None, request.method}
            and self.key in {None, request.key}
            and self.offset in {None, request.offset}
            and (self.after == 0 or self.after < request.length)
        )

    async def apply(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.delay_s:
            await trio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error


class MemoryStore:
    """Objects by key, each with its history: a version that has an id can be read after it was replaced or deleted.

    ``requests`` holds every call in the order of their starts, ``fetched`` the bytes given by (key, offset) to
    the reads that succeeded, ``contents`` all that was ever put by (key, ETag). A store that is not *streaming* passes
    wrong bytes on in a read that fails; one that is reads in another thread, so that what lands may be told at once.
    ``digests`` are what it tells of objects by key.
    """

    def __init__(
        self, objects: dict[str, bytes] | None = None, *, identity: str = "memory://test", streaming: bool = False
    ) -> None:
        self._identity = identity
        self._streaming = streaming
        self._current: dict[str, Generation] = {}
        self._versions: dict[tuple[str, str], Generation] = {}
        self._symlinks: dict[str, Symlink] = {}
        self._rules: list[_Rule] = []
        self._arrivals = trio.Event()
        self._clock = 0
        self.digests: dict[str, Digest] = {}
        self._corruptions: Counter[tuple[str, int]] = Counter()
        self.contents: dict[tuple[str, str], bytes] = {}
        self.requests: list[Request] = []
        self.fetched: Counter[tuple[str, int]] = Counter()
        self.under_way = 0
        self.most_under_way = 0
        self.closed = False
        for key, content in (objects or {}).items():
            self.put(key, content)

    # What tests do to it

    def put(self, key: str, content: bytes, *, version_id: str | None = None) -> Generation:
        """Make or replace an object; the new generation."""
        self._clock += 1
        generation = Generation(
            key=key,
            etag=f'"{hashlib.md5(content).hexdigest()}"',
            size=len(content),
            modified_ns=self._clock * 1_000_000_000,
            version_id=version_id,
        )
        self._current[key] = generation
        self.contents[key, generation.etag] = content
        if version_id is not None:
            self._versions[key, version_id] = generation
        return generation

    def link(self, key: str, target: str) -> Symlink:
        self._symlinks[key] = Symlink(key=key, target=target)
        return self._symlinks[key]

    def delete(self, key: str) -> None:
        """Delete the newest generation of an object; one with a version id can still be read by that."""
        del self._current[key]

    def purge(self, key: str, version_id: str) -> None:
        version = self._versions.pop((key, version_id))
        if self._current.get(key) is version:
            del self._current[key]

    def generation(self, key: str) -> Generation:
        """The newest generation, as a listing shows it: without its version id."""
        return replace(self._current[key], version_id=None)

    def fail(self, error: StoreError, **match: Unpack[Match]) -> None:
        """Fail the next request that matches, or *times*; reads of more than *after* bytes once that many came."""
        match.setdefault("times", 1)
        self._rules.append(_Rule(error=error, **match))

    def block(self, **match: Unpack[Match]) -> trio.Event:
        """Hold the matching requests back until the returned event is set, as `fail` fails them."""
        gate = trio.Event()
        self._rules.append(_Rule(gate=gate, **match))
        return gate

    def delay(self, delay_s: float, **match: Unpack[Match]) -> None:
        """Let the matching requests take that long, on trio's clock."""
        self._rules.append(_Rule(delay_s=delay_s, **match))

    def corrupt(self, key: str, offset: int, *, times: int = 1) -> None:
        """Pass a wrong byte on, at this place of an object, the next *times* that it is read."""
        self._corruptions[key, offset] += times

    def heal(self) -> None:
        """Forget all failures and delays, and let everything held back go on."""
        rules, self._rules = self._rules, []
        for rule in rules:
            if rule.gate is not None:
                rule.gate.set()

    # What tests ask of it

    def count(self, method: str, key: str | None = None) -> int:
        """How often a method was called, for a key or in all."""
        return sum(request.method == method and key in {None, request.key} for request in self.requests)

    def reads(self, key: str | None = None) -> list[int]:
        """The offsets that were read, in the order of the requests."""
        return [request.offset for request in self.requests if request.method == "read" and key in {None, request.key}]

    def reads_by_key(self) -> dict[str, list[int]]:
        """The offsets that were read of each object."""
        offsets = defaultdict(list)
        for request in self.requests:
            if request.method == "read":
                offsets[request.key].append(request.offset)
        return dict(offsets)

    async def arrived(self, count: int, *, method: str = "read") -> None:
        """Wait until a method has been called *count* times in all."""
        while self.count(method) < count:
            await self._arrivals.wait()

    # The Store protocol

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def streaming(self) -> bool:
        return self._streaming

    @property
    def forkable(self) -> bool:
        return False

    @property
    def links(self) -> bool:
        return False

    async def probe(self) -> None:
        async with self._serving(Request(method="probe")):
            return

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        async with self._serving(Request(method="list_page", key=prefix)):
            names = set()
            for key in (*self._current, *self._symlinks):
                if key.startswith(prefix) and key != prefix:
                    name, slash, _ = key[len(prefix) :].partition("/")
                    names.add(prefix + name + slash)
            left = sorted(name for name in names if token is None or name > token)
            page = left[: min(limit, PAGE_LIMIT)]
            keys = [name for name in page if not name.endswith("/")]
            return Page(
                objects=tuple(self.generation(key) for key in keys if key not in self._symlinks),
                prefixes=tuple(name for name in page if name.endswith("/")),
                next_token=page[-1] if len(page) < len(left) else None,
                symlinks=tuple(self._symlinks[key] for key in keys if key in self._symlinks),
                symlink=self._symlinks.get(prefix.removesuffix("/")),
            )

    async def stat(self, key: str) -> Generation:
        async with self._serving(Request(method="stat", key=key)):
            if key not in self._current:
                raise ObjectNotFoundError(f"{key}: no such object")
            return self._current[key]

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        key, version = generation.key, generation.version_id
        assert offset >= 0
        assert 0 < length <= generation.size - offset
        request = Request(method="read", key=key, offset=offset, length=length, version_id=version)
        begun = False
        try:
            async with self._serving(request) as rules:
                held = self._held(generation)
                content = self._corrupted(key, self.contents[key, held.etag], offset, offset + length)
                done = 0
                for rule in sorted(rules, key=lambda rule: rule.after):
                    begun = True
                    await self._pass_on(content[done : rule.after], sink)
                    done = rule.after
                    await rule.apply()
                begun = True
                await self._pass_on(content[done:], sink)
                if not self._streaming:
                    held = self._held(generation)  # it may have been replaced meanwhile
        except StoreError:
            if not self._streaming and not begun:
                await self._pass_on(b"\xee" * length, sink)
            raise
        self.fetched[key, offset] += length
        return held.version_id

    def _corrupted(self, key: str, content: bytes, start: int, stop: int) -> bytes:
        """The bytes ``[start, stop)`` of a content, with those wrong that are to be."""
        given = bytearray(content[start:stop])
        for (corrupted, offset), times in self._corruptions.items():
            if corrupted == key and start <= offset < stop and times:
                given[offset - start] ^= 0x10
                self._corruptions[corrupted, offset] -= 1
        return bytes(given)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        async with self._serving(Request(method="digest", key=generation.key, version_id=generation.version_id)):
            self._held(generation)
            told = self.digests.get(generation.key)
            return None if told is None or (certain and not told.certain) else told

    def _held(self, generation: Generation) -> Generation:
        """The stored object that a generation is. Raises as `read` does."""
        key, version = generation.key, generation.version_id
        held = self._current.get(key)
        if version is not None:
            held = self._versions.get((key, version))
            if held is None:
                raise ObjectChangedError(f"{key}: there is no version {version}")
        if held is None:
            raise ObjectNotFoundError(f"{key}: no such object")
        if held.etag != generation.etag:
            raise ObjectChangedError(f"{key}: its ETag is now {held.etag}")
        return held

    async def _pass_on(self, content: bytes, sink: Sink) -> None:
        if self._streaming:
            await trio.to_thread.run_sync(_pieces, content, sink)
        else:
            _pieces(content, sink)

    async def aclose(self) -> None:
        self.closed = True

    @asynccontextmanager
    async def _serving(self, request: Request) -> AsyncIterator[list[_Rule]]:
        """Count a request while it is served, and first wait and fail as the rules say; those that apply later."""
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        arrivals, self._arrivals = self._arrivals, trio.Event()
        arrivals.set()
        try:
            await trio.lowlevel.checkpoint()
            later = []
            for rule in [rule for rule in self._rules if rule.matches(request)]:
                rule.times -= 1
                if rule.after:
                    later.append(rule)
                else:
                    await rule.apply()
            yield later
        finally:
            self.under_way -= 1


def _pieces(content: bytes, sink: Sink) -> None:
    """Pass bytes on, in one buffer that is used again, as a store may."""
    buffer = memoryview(bytearray(PIECE))
    for begin in range(0, len(content), PIECE):
        piece = content[begin : begin + PIECE]
        buffer[: len(piece)] = piece
        sink(buffer[: len(piece)])
        buffer[:] = bytes(PIECE)


def as_store(store: MemoryStore) -> Store:
    """The same store; lets the type checker compare it with the protocol."""
    return store


class Reticent(MemoryStore):
    """A store that may not tell what one of its names is."""

    secret = True

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        page = await super().list_page(prefix, token=token, limit=limit)
        return replace(page, unreadable=("dir/secret",)) if self.secret and prefix == "dir/" else page

    async def stat(self, key: str) -> Generation:
        if self.secret and key == "dir/secret":
            raise StoreAccessError(f"{key}: Permission denied")
        return await super().stat(key)
