"""The store of repositories of a hub: each file is read at one commit."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from cachetools import LRUCache

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from trimsfs.extras.stores.huggingface.hub import Hub
from trimsfs.extras.stores.huggingface.repositories import MAIN, Place, Repository, is_commit, parse, place
from trimsfs.options import MountOptions
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, moment
from trimsfs.stores.digests import Algorithm, Digest
from trimsfs.stores.http.bodies import METADATA_THREADS, RequestThreads
from trimsfs.stores.http.failures import MalformedAnswerError, parsing, translated
from trimsfs.stores.http.receive_loop import HttpBody
from trimsfs.types import Generation

T = TypeVar("T")

MOST_COMMITS = 1024
"""Commits whose times are remembered."""
PATH_MAX = 4096
"""Bytes of the longest path that is asked for."""
_NOTHING = Page(objects=(), prefixes=(), next_token=None)
_ALGORITHMS: dict[int, Algorithm] = {40: "git-sha1", 64: "sha256"}
"""What an ETag is, by its digits: git's id of a small file, the digest of one in LFS or Xet."""
_HEX = re.compile(r"[0-9a-f]+")


class _Head(NamedTuple):
    """What a revision is: a commit, and its time in nanoseconds."""

    commit: str
    modified_ns: int


class HubStore:
    """Repositories of a hub. In a layout of repositories, keys begin with ORG/NAME even if the URL names but one.

    Each listing and `stat` asks once which commit the revision is. Whatever they find is read at that commit, whatever
    is committed later. ETags are the ids of the contents: a SHA-256, or git's id. Requests are tried once.
    """

    streaming = True  # a commit is read, which does not change
    forkable = True
    links = False

    def __init__(self, url: str, options: MountOptions, *, max_requests: int) -> None:
        self._source = parse(url, whole=options.layout != "plain")
        self._hub = Hub(options, connections=max_requests + METADATA_THREADS)
        self._times = LRUCache[str, int](maxsize=MOST_COMMITS)
        self._lock = Lock()
        named = ",".join((*self._source.owners, *map("@".join, self._source.revisions.items())))
        self._subject = f"hf://{self._source.base.rstrip('/') or named}"
        self._threads = RequestThreads(
            self._subject, self._translated, max_requests=max_requests, stall_timeout_s=options.stall_timeout
        )

    @property
    def identity(self) -> str:
        return f"{self._hub.endpoint}|{self._subject}"

    async def probe(self) -> None:
        await self._threads.ask(self._probe)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        if not _possible(prefix.removesuffix("/")):
            return _NOTHING
        return await self._threads.ask(partial(self._list, prefix, token, min(limit, PAGE_LIMIT)))

    async def stat(self, key: str) -> Generation:
        return await self._threads.ask(partial(self._stat, key), key)

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        get = partial(self._get, generation, offset, length)
        return await self._threads.read(get, length, sink, generation.key)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        algorithm = _ALGORITHMS.get(len(generation.etag))
        if algorithm is None or not _HEX.fullmatch(generation.etag):
            return None
        return Digest(algorithm=algorithm, value=bytes.fromhex(generation.etag))

    async def refs(self, repository: str) -> Mapping[str, str]:
        """The commits of a repository's branches and tags, and as ``main`` that of the revision that the URL names.

        *repository* is the beginning of keys, without a closing slash.
        """
        return await self._threads.ask(partial(self._refs, repository))

    async def aclose(self) -> None:
        self._hub.close()

    def _translated(self, function: Callable[[], T], key: str) -> T:
        """Call *function*, which makes a request. Raises StoreErrors of one line, which name the *key*."""

        def malformed(error: MalformedAnswerError) -> StoreError:
            reason = f"the answer is not from a Hugging Face hub: check HF_ENDPOINT ({type(error.__cause__).__name__})"
            return StoreUnavailableError(f"{self._subject}: {reason}")

        try:
            return translated(function, malformed)
        except (ObjectChangedError, ObjectNotFoundError) as error:
            raise type(error)(f"{key}: {error}" if key else str(error)) from error

    # Names

    def _place(self, key: str) -> Place | None:
        """What a key names; None if no repository of this store."""
        target = place(self._source.base + key)
        return target if target is not None and self._source.has(target.repository) else None

    def _head(self, repository: Repository, revision: str | None) -> _Head:
        """What a revision of a repository is now. Raises BucketNotFoundError."""
        revision = revision or self._source.revisions.get(repository.path, MAIN)
        with self._lock:
            known = self._times.get(revision) if is_commit(revision) else None
        if known is not None:
            return _Head(revision, known)
        path = f"{repository.api}/revision/{quote(revision, safe='')}"
        try:
            about, _ = self._hub.ask(repository, path, {"expand": ["sha", "lastModified"]})
        except ObjectNotFoundError as error:
            raise BucketNotFoundError(f"{repository} does not exist: check the spelling, and HF_ENDPOINT") from error
        with parsing():
            modified = about.get("lastModified")  # some mirrors of the hub do not tell
            seconds = datetime.fromisoformat(modified).timestamp() if modified else 0.0
            head = _Head(str(about["sha"]), moment(int(seconds * 1e9)))
        with self._lock:
            self._times[head.commit] = head.modified_ns
        return head

    def _probe(self) -> None:
        for path in self._source.revisions:
            if (target := place(path)) is not None:
                self._head(target.repository, None)
                with suppress(ObjectNotFoundError):  # some mirrors of the hub cannot tell
                    self._hub.ask(target.repository, f"{target.repository.api}/auth-check", {})
        for owner in self._source.owners:
            self._list_owner(owner, "", None, 1)

    def _list(self, prefix: str, token: str | None, limit: int) -> Page:
        path = self._source.base + prefix
        target = self._place(prefix)
        if target is not None:
            try:
                return self._list_tree(target, prefix, token, limit)
            except BucketNotFoundError:
                if self._source.one_repository:
                    raise
                return _NOTHING
        if path.removesuffix("/") in self._source.owners:
            return self._list_owner(path.removesuffix("/"), prefix, token, limit)
        names = [name for name in self._source.children(path) if token is None or name > token]
        page = names[:limit]
        more = page[-1] if len(names) > limit else None
        return Page(objects=(), prefixes=tuple(f"{prefix}{name}/" for name in page), next_token=more)

    def _list_owner(self, owner: str, prefix: str, token: str | None, limit: int) -> Page:
        kind, _, name = owner.rpartition("/")
        query = {"author": name, "limit": str(limit)} | ({} if token is None else {"cursor": token})
        repositories, cursor = self._hub.ask(None, kind or "models", query)
        with parsing():
            names = [str(repository["id"]).rpartition("/")[2] for repository in repositories]
        return Page(objects=(), prefixes=tuple(f"{prefix}{name}/" for name in names), next_token=cursor)

    def _list_tree(self, target: Place, prefix: str, token: str | None, limit: int) -> Page:
        commit, _, cursor = (token or "").partition(" ")
        head = self._head(target.repository, commit or target.revision)
        path = f"{target.repository.api}/tree/{head.commit}/{quote(target.path.rstrip('/'), safe='')}".rstrip("/")
        query = {"limit": str(limit)} | ({"cursor": cursor} if cursor else {})
        try:
            entries, following = self._hub.ask(target.repository, path, query)
        except ObjectNotFoundError:
            return _NOTHING
        start = len(target.path)
        with parsing():
            named = [
                (prefix + entry["path"][start:], entry) for entry in entries if entry["path"].startswith(target.path)
            ]
            return Page(
                objects=tuple(_generation(key, entry, head) for key, entry in named if entry["type"] == "file"),
                prefixes=tuple(f"{key}/" for key, entry in named if entry["type"] == "directory"),
                next_token=f"{head.commit} {following}" if following is not None else None,
                empty=not target.path,
            )

    def _stat(self, key: str) -> Generation:
        target = self._place(key) if _possible(key) else None
        if target is None or not target.path:
            raise ObjectNotFoundError(f"no such file in {self._subject}")
        try:
            return self._find(key, target)
        except BucketNotFoundError as error:
            if self._source.one_repository:
                raise
            raise ObjectNotFoundError(str(error)) from error

    def _find(self, key: str, target: Place) -> Generation:
        """The newest generation of a file. Raises ObjectNotFoundError and BucketNotFoundError."""
        repository, head = target.repository, self._head(target.repository, target.revision)
        wanted = {"paths": target.path, "expand": "False"}
        entries, _ = self._hub.ask(repository, f"{repository.api}/paths-info/{head.commit}", {}, wanted)
        with parsing():
            for entry in entries:
                if entry["type"] == "file" and entry["path"] == target.path:
                    return _generation(key, entry, head)
        raise ObjectNotFoundError(f"no such file in {repository}")

    def _refs(self, repository: str) -> Mapping[str, str]:
        target = self._place(f"{repository}/")
        if target is None:
            return {}
        revision = self._source.revisions.get(target.repository.path, MAIN)
        try:
            answer, _ = self._hub.ask(target.repository, f"{target.repository.api}/refs", {})
            with parsing():
                listed = [ref for kind in ("branches", "tags", "converts") for ref in answer.get(kind) or ()]
                refs = {str(ref["name"]): str(ref["targetCommit"]) for ref in listed}
            return refs | {MAIN: refs.get(revision) or self._head(target.repository, revision).commit}
        except BucketNotFoundError:
            return {}

    # Bytes

    def _get(self, generation: Generation, offset: int, length: int) -> tuple[HttpBody, str]:
        """The body that has the bytes, and the commit that it is from."""
        target = self._place(generation.key) if _possible(generation.key) else None
        if target is None:
            raise ObjectNotFoundError(f"no such file in {self._subject}")
        if generation.version_id is not None:
            try:
                return self._open(target.repository, generation.version_id, target.path, generation, offset, length)
            except (BucketNotFoundError, ObjectNotFoundError):
                pass  # the hub has dropped the commit, as when its owner squashes the history
        newest = self._find(generation.key, replace(target, revision=None))
        if (newest.etag, newest.size) != (generation.etag, generation.size) or newest.version_id is None:
            raise ObjectChangedError(f"its ETag is now {newest.etag}")
        return self._open(target.repository, newest.version_id, target.path, generation, offset, length)

    def _open(
        self, repository: Repository, commit: str, path: str, generation: Generation, offset: int, length: int
    ) -> tuple[HttpBody, str]:
        response = self._hub.open(repository, commit, path, generation.etag, offset, length, generation.size)
        return HttpBody(response, cut_off=partial(self._hub.forget, (repository.path, commit, path))), commit


def _generation(key: str, entry: Mapping[str, Any], head: _Head) -> Generation:
    """A file of a commit, as the API tells it."""
    large = entry.get("lfs") or {}
    return Generation(
        key=key,
        etag=str(large.get("oid") or entry["oid"]),
        size=int(large.get("size", entry["size"])),
        modified_ns=head.modified_ns,
        version_id=head.commit,
    )


def _possible(key: str) -> bool:
    """Whether a name can be a path in a repository. Names from the kernel are any bytes."""
    try:
        return len(key.encode()) <= PATH_MAX and {"", ".", ".."}.isdisjoint(key.split("/") if key else ())
    except UnicodeEncodeError:
        return False
