"""Versions of models in any store: shows those that are published, and aliases as symbolic links to them.

A directory ``NAME`` whose ``NAME/.trims-versions/`` holds anything is a versioned model. Of its directories only those
exist that have a manifest there and no tombstone. Everything else in a store is shown as it is.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import trio
from cachetools import LRUCache

from trimsfs.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.formats.table import FormatError
from trimsfs.formats.version_records import ALIASES, DIRECTORY, REMOVED, Alias, alias_of, version_of_manifest
from trimsfs.stores.base import PAGE_LIMIT, Page, Paging, Store, StoreWrapper
from trimsfs.stores.digests import Digest
from trimsfs.stores.layouts.version_manifests import RECHECK_S, FileOfVersion, VersionManifests, content_of, find
from trimsfs.types import Generation, Symlink

log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S")

MOST_DIRECTORIES = 10_000
"""Most directories of which the store remembers whether they are versioned models; as many aliases."""
MOST_FILES = 20_000
"""Most objects in one directory of what describes a model's versions."""
ALIASES_AT_ONCE = 32
"""Most aliases of a model that are read at the same time."""
MOST_READS = 3
"""Most attempts to read an alias that moves meanwhile."""
LARGEST_ALIAS = 64 << 10
_NOTHING = Page(objects=(), prefixes=(), next_token=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """What a model shows: names of versions, and links to them."""

    versions: frozenset[str]
    aliases: tuple[Symlink, ...]


class VersionedStore(StoreWrapper):
    """A store as a mount shows it. Requests for directories that are no versioned models are passed on.

    Where it does not know yet whether a directory is one, it asks at the same time as it passes the request on. It asks
    once more of a directory that is there and is no version.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._versioned: LRUCache[str, bool] = LRUCache(MOST_DIRECTORIES)
        """Whether a directory is a versioned model, by its prefix."""
        self._plain: LRUCache[str, float] = LRUCache(MOST_DIRECTORIES)
        """When a directory was last found to be none; for RECHECK_S it counts as none for names in it."""
        self._targets: LRUCache[str, tuple[str, str | None]] = LRUCache(MOST_DIRECTORIES)
        """The ETag of an alias's object and the version that it names, by the key of the alias in the mount."""
        self._listed: LRUCache[str, _Published] = LRUCache(
            5 * MOST_FILES, getsizeof=lambda one: 1 + len(one.versions) + len(one.aliases)
        )
        """What listings of several pages under way go by."""
        self.manifests = VersionManifests(store)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        if _describes(prefix):
            return _NOTHING
        if prefix and token is None and limit == 1:
            return await self._probe_directory(prefix)
        page = await self.store.list_page(prefix, token=token, limit=limit)
        if not await self._is_versioned(prefix, page, token):
            return page
        published = self._listed.get(prefix) if token is not None else None
        if published is None:
            published = await self._published(prefix)
        if page.next_token is not None:
            self._listed[prefix] = published
        aliases = {link.key for link in published.aliases}  # they win over objects of their names
        return replace(
            page,
            objects=tuple(generation for generation in page.objects if generation.key not in aliases),
            prefixes=tuple(below for below in page.prefixes if below[len(prefix) : -1] in published.versions),
            symlinks=page.symlinks + (published.aliases if token is None else ()),
            empty=page.exists,
        )

    async def stat(self, key: str) -> Generation:
        _, target = self._targets.get(key, ("", None))
        if _describes(key) or target is not None:  # what is no valid alias hides no object
            raise ObjectNotFoundError(f"{key}: no such object")
        return await self.store.stat(key)

    # Directories

    async def _is_versioned(self, prefix: str, page: Page, token: str | None) -> bool:
        """Whether a directory is a versioned model, by a page of its listing as far as that tells."""
        if f"{prefix}{DIRECTORY}/" in page.prefixes:
            self._remember(prefix, versioned=True)
        elif token is None and page.next_token is None:
            self._remember(prefix, versioned=False)
        elif token is None or prefix not in self._versioned or (page.prefixes and not self._versioned[prefix]):
            await self._ask(prefix)  # after each page with directories: a push may have begun since the one before
        return self._versioned[prefix]

    async def _ask(self, prefix: str) -> bool:
        """Ask whether a directory is a versioned model."""
        try:
            exists = (await self.store.list_page(f"{prefix}{DIRECTORY}/", limit=1)).exists
        except StoreAccessError:  # where only some prefixes may be listed
            exists = False
        self._remember(prefix, versioned=exists)
        return exists

    def _remember(self, prefix: str, *, versioned: bool) -> None:
        self._versioned[prefix] = versioned
        if not versioned:
            self._plain[prefix] = trio.current_time()

    async def _probe_directory(self, prefix: str) -> Page:
        """The first entry of a directory, to see whether there is one: of a model's, only if it is a version."""
        model, name = _split(prefix)
        if prefix[:-1] in self._targets and (link := await self._alias(model, name)) is not None:
            return replace(_NOTHING, symlink=link)
        listing = partial(self.store.list_page, prefix, limit=1)
        if self._versioned.get(model):
            page, (published, link) = await _both(listing, partial(self._look, model, name))
        else:
            if trio.current_time() - self._plain.get(model, -RECHECK_S) < RECHECK_S:
                page, versioned = await listing(), False
            else:
                page, versioned = await _both(listing, partial(self._ask, model))
            if page.exists and not versioned:
                # Only an answer from after the listing counts: a push writes its reservation before its first file.
                versioned = await self._ask(model)
            published, link = await self._look(model, name) if versioned else (True, None)
        if published:
            shown = tuple(below for below in page.prefixes if not below.endswith(f"/{DIRECTORY}/"))
            return replace(page, prefixes=shown, empty=page.exists)
        return replace(_NOTHING, symlink=link)

    async def _look(self, model: str, name: str) -> tuple[bool, Symlink | None]:
        """Whether a name in a model is a version, and the link that it is if not."""
        if version_of_manifest(f"{name}.json") is None and alias_of(f"{name}.json") is None:
            return False, None
        description = f"{model}{DIRECTORY}/"
        (manifest, tombstone), link = await _both(
            partial(
                _each,
                partial(find, self.store, f"{description}{name}.json"),
                partial(find, self.store, f"{description}{REMOVED}/{name}.json"),
            ),
            partial(self._alias, model, name),
        )
        return manifest is not None and tombstone is None, link

    async def _published(self, model: str) -> _Published:
        """The versions and aliases of a model."""
        description = f"{model}{DIRECTORY}/"
        manifests, tombstones, aliases = await _each(
            partial(self._files, description),
            partial(self._files, f"{description}{REMOVED}/"),
            partial(self._files, f"{description}{ALIASES}/"),
        )
        named = [(name, generation) for file, generation in aliases.items() if (name := alias_of(file)) is not None]
        links = list[Symlink | None]()
        for start in range(0, len(named), ALIASES_AT_ONCE):
            some = named[start : start + ALIASES_AT_ONCE]
            links += await _each(*(partial(self._listed_link, model, *one) for one in some))
        removed = set(map(version_of_manifest, tombstones))
        versions = {version for file in manifests if (version := version_of_manifest(file)) not in removed}
        return _Published(
            versions=frozenset(version for version in versions if version is not None),
            aliases=tuple(link for link in links if link is not None),
        )

    async def _files(self, prefix: str) -> dict[str, Generation]:
        """The files of a directory by name. Raises StoreUnavailableError if there are more than versions can need."""
        page, paging = await self.store.list_page(prefix), Paging()
        objects = list(page.objects)
        while (problem := paging.problem(page)) is None and page.next_token is not None:
            page = await self.store.list_page(prefix, token=page.next_token)
            objects += page.objects
            if len(objects) > MOST_FILES:
                raise StoreUnavailableError(f"/{prefix}: over {MOST_FILES} objects: see who can write to the store")
        if problem is not None:
            raise StoreUnavailableError(f"/{prefix}: the listing has no end: {problem}: tell who runs the store")
        return {generation.key[len(prefix) :]: generation for generation in objects}

    # Aliases

    async def _alias(self, model: str, name: str) -> Symlink | None:
        """The link that an alias is now; None if there is no such alias."""
        if alias_of(f"{name}.json") is None:
            return None
        for _ in range(MOST_READS):
            generation = await find(self.store, f"{model}{DIRECTORY}/{ALIASES}/{name}.json")
            if generation is None:
                self._targets.pop(model + name, None)
                return None
            try:
                return await self._link(model, name, generation)
            except (ObjectChangedError, ObjectNotFoundError):
                pass  # it has moved since
        raise TransientStoreError(f"{model}{name}: the alias moved repeatedly while being read")

    async def _listed_link(self, model: str, name: str, generation: Generation) -> Symlink | None:
        """As `_link`, by a listing; the link that it is by now if it has moved since."""
        try:
            return await self._link(model, name, generation)
        except (ObjectChangedError, ObjectNotFoundError):
            return await self._alias(model, name)

    async def _link(self, model: str, name: str, generation: Generation) -> Symlink | None:
        """The link that an alias is by this generation of its object; None if that is no valid one."""
        key = model + name
        known = self._targets.get(key)
        if known is None or known[0] != generation.etag:
            known = self._targets[key] = generation.etag, await self._target(generation)
        return None if known[1] is None else Symlink(key=key, target=known[1])

    async def _target(self, generation: Generation) -> str | None:
        try:
            if generation.size > LARGEST_ALIAS:
                raise FormatError(f"larger than {LARGEST_ALIAS} bytes")
            return Alias.parse(await content_of(self.store, generation)).version
        except FormatError as error:
            log.warning("/%s: not an alias, so it is not shown: %s", generation.key, error)
            return None

    # Digests

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        """The SHA-256 in the manifest of a version for its files; the store's digest for others."""
        models = list(_models(generation.key))
        from_store = partial(self.store.digest, generation, certain=certain)
        unknown = [model for model in models if model not in self._versioned]
        digest: Digest | None = None
        asked = False
        if unknown and not any(self._versioned.get(model) for model in models):
            digest, _ = await _both(from_store, partial(_each, *(partial(self._ask, model) for model in unknown)))
            asked = True
        for file in self._files_of(generation.key):
            value = await self.manifests.sha256(file, generation.etag)
            if value is not None:
                return Digest(algorithm="sha256", value=value)
        return digest if asked else await from_store()

    async def version_of(self, key: str) -> FileOfVersion | None:
        """The version that a file belongs to; None if there is none."""
        unknown = [model for model in _models(key) if model not in self._versioned]
        await _each(*(partial(self._ask, model) for model in unknown))
        return next(self._files_of(key), None)

    def _files_of(self, key: str) -> Iterator[FileOfVersion]:
        """The versions that a file may belong to, as far as is known: that of the innermost model first."""
        for model in reversed([*_models(key)]):
            version, _, path = key[len(model) :].partition("/")
            if self._versioned.get(model) and version_of_manifest(f"{version}.json") is not None:
                yield FileOfVersion(model=model, version=version, path=path)


def _describes(key: str) -> bool:
    """Whether an object or prefix belongs to what describes versions."""
    return DIRECTORY in key.split("/")


def _split(prefix: str) -> tuple[str, str]:
    """The directory that holds a directory, and its name there."""
    model, slash, name = prefix[:-1].rpartition("/")
    return model + slash, name


def _models(key: str) -> Iterator[str]:
    """The directories of which a file could belong to a version, from the root down."""
    parts = key.split("/")
    for depth in range(len(parts) - 1):
        yield "".join(f"{part}/" for part in parts[:depth])


async def _each(*calls: Callable[[], Awaitable[T]]) -> Sequence[T]:
    """The results of calls that run at the same time. Raises the first StoreError by itself, not in a group."""
    results: list[Any] = [None] * len(calls)
    failed = list[StoreError]()

    async def run(place: int, call: Callable[[], Awaitable[T]], scope: trio.CancelScope) -> None:
        try:
            results[place] = await call()
        except StoreError as error:
            failed.append(error)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for place, call in enumerate(calls):
            nursery.start_soon(run, place, call, nursery.cancel_scope)
    if failed:
        raise failed[0]
    return results


async def _both(first: Callable[[], Awaitable[S]], second: Callable[[], Awaitable[T]]) -> tuple[S, T]:
    """As `_each`, for two results of different types."""
    calls: Sequence[Callable[[], Awaitable[Any]]] = (first, second)
    one, other = await _each(*calls)
    return one, other
