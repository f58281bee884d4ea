"""The layout of a Hugging Face cache: the repositories of any store, as huggingface_hub looks for them on disk.

A repository ORG/NAME is the directory ``models--ORG--NAME``. Its ``refs/main`` holds the id of a commit. The directory
``snapshots/COMMIT`` has the files of exactly that commit, and ``blobs`` a symbolic link to each by its content's id.
huggingface_hub makes the links the other way round, and reads both. Here a file that is opened has its own name.
Prefetching, signatures, access rules and formats go by names, and no open waits for a link to be read.
"""

import hashlib
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, runtime_checkable

import trio
from cachetools import LRUCache

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.concurrency.late_answers import LateAnswers
from trimsfs.errors import ObjectNotFoundError, StoreStalledError, StoreUnavailableError, TransientStoreError
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, Store, StoreWrapper
from trimsfs.stores.digests import Digest
from trimsfs.types import Generation, Symlink

MOST_FILES = 100_000
"""Most files of a repository."""
TREES = 16
"""Commits of a hub whose files are remembered."""
RECENT = 8
"""Last commits of ``main`` that stay visible when no branch leads to them any more: programs may be loading them."""
REPOSITORIES = 10_000
"""Repositories whose recent commits are remembered."""
RETRY_AFTER_S = (0.1, 1.0)
"""When a page that fails is asked for again, so that one of many does not make the whole walk begin anew."""
UNFINISHED = 16
"""Listings that are remembered for their next page."""
_KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
"""By the first word of a folder, where the repositories are in the store."""
_FOLDER = re.compile(r"(models|datasets|spaces)--([^/]+?)(?:--([^/]+))?")

_COMMIT = re.compile(r"[0-9a-f]{40}")

Refs = Callable[[str], Awaitable[Mapping[str, str]]]
"""The commits of a repository's branches and tags, with ``main``; none if there is no such repository."""
Files = dict[str, Generation | None]
"""The files of a repository by path; None for one that may not be looked at, or for a directory."""
Entry = Generation | Symlink | None
"""What a path is; None for a directory, whose path ends in ``/``, and for a file that may not be looked at."""


@runtime_checkable
class HasRefs(Protocol):
    """A store of repositories that have commits, as those of a hub. In this layout, its keys begin with ORG/NAME."""

    async def refs(self, repository: str) -> Mapping[str, str]:
        """As `Refs`."""


class HfCacheStore(StoreWrapper):
    """Shows the directories ORG/NAME of another *store* as a Hugging Face cache.

    The *refs* of a hub give its commits. Without them, the commit of a repository is a hash of its list of files. So a
    program that has read ``refs/main`` gets the files of that moment or none, never a mix. With *share_links*, a
    content that several commits have is one file on disk and in memory.
    """

    def __init__(self, store: Store, refs: Refs | None, *, share_links: bool) -> None:
        super().__init__(store)
        self._refs_of_hub = refs
        self._share_links = share_links
        self._trees = LRUCache[str, Files](maxsize=TREES)
        self._recent = LRUCache[str, deque[str]](maxsize=REPOSITORIES)
        self._unfinished = LRUCache[tuple[str, str], dict[str, Entry]](maxsize=UNFINISHED)
        self._walks = LateAnswers[Files]()

    @property
    def identity(self) -> str:
        return f"{self.store.identity}|hf-cache"

    @property
    def links(self) -> bool:
        return self._share_links

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        names, symlink = self._unfinished.pop((prefix, token or ""), None), None
        if names is None:
            paths = await self._paths(prefix)
            names, symlink = _level(paths, prefix), paths.get(prefix.removesuffix("/"))
        left = sorted(name for name in names if token is None or name > token)
        page = {name: names[name] for name in left[:limit]}
        following = left[limit - 1] if len(left) > limit else None
        if following is not None:
            self._unfinished[prefix, following] = names
        return Page(
            objects=tuple(entry for entry in page.values() if isinstance(entry, Generation)),
            prefixes=tuple(name for name, entry in page.items() if entry is None and name.endswith("/")),
            next_token=following,
            empty=not prefix,
            unreadable=tuple(name for name, entry in page.items() if entry is None and not name.endswith("/")),
            symlinks=tuple(entry for entry in page.values() if isinstance(entry, Symlink)),
            symlink=symlink if isinstance(symlink, Symlink) else None,
        )

    async def stat(self, key: str) -> Generation:
        entry = (await self._paths(key[: key.rfind("/") + 1])).get(key)
        if not isinstance(entry, Generation):
            raise ObjectNotFoundError(f"{key}: no such file")
        return entry

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        inner = self._inner(generation)
        if inner is not None:
            return await self.store.read(inner, offset, length, sink)
        # A ref: its ETag is its content.
        await in_thread(partial(sink, generation.etag.encode()[offset : offset + length]))
        return None

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        inner = self._inner(generation)
        return None if inner is None else await self.store.digest(inner, certain=certain)

    async def aclose(self) -> None:
        self._walks.close()
        await super().aclose()

    def _inner(self, generation: Generation) -> Generation | None:
        """The file of a snapshot in the store below; None for a ref."""
        folder, section, rest = generation.key.split("/", 2)
        if section == "refs":
            return None
        commit, _, path = rest.partition("/")
        return replace(generation, key=f"{self._root(_repository(folder) or '', commit)}{path}", linked=None)

    def _root(self, repository: str, commit: str) -> str:
        """Where the files of a commit are in the store below."""
        return f"{repository}/" if self._refs_of_hub is None else f"{repository}@{commit}/"

    # Names

    async def _paths(self, prefix: str) -> Mapping[str, Entry]:
        """The paths of the smallest part of the tree that has all of the directory *prefix*."""
        folder, _, rest = prefix.partition("/")
        section, _, below = rest.partition("/")
        if not folder:
            return await self._walks.of("", self._folders)
        repository = _repository(folder)
        if repository is None:
            return {}
        if not section:
            there = await self._exists(repository)
            return {f"{folder}/{name}/": None for name in ("blobs", "refs", "snapshots") if there}
        match section:
            case "refs":
                return {
                    f"{folder}/refs/{name}": Generation(
                        key=f"{folder}/refs/{name}", etag=commit, size=len(commit), modified_ns=0
                    )
                    for name, commit in (await self._refs(repository)).items()
                }
            case "snapshots" if not below:
                return {f"{folder}/snapshots/{commit}/": None for commit in await self._commits(repository)}
            case "snapshots":
                commit = below.partition("/")[0]
                return self._snapshot(folder, commit, await self._files(repository, commit))
            case "blobs":
                commit = (await self._refs(repository)).get("main", "")
                return {
                    blob: Symlink(key=blob, target=f"../snapshots/{commit}/{path}")
                    for path, file in (await self._files(repository, commit)).items()
                    if file is not None and (blob := self._blob(folder, path, file))
                }
        return {}

    async def _folders(self) -> Files:
        """The folders of all repositories: a directory that has files is one, or else those in it are."""
        owners, folders = [name for page in await self._pages("") for name in page.prefixes], Files()
        for place in _KINDS.values():
            if place in owners:
                owners.remove(place)
                owners += [name for page in await self._pages(place, again=True) for name in page.prefixes]
        for owner in owners:
            pages = await self._pages(owner, again=True)
            inside = [name for page in pages for name in page.prefixes]
            for name in [owner] if any(page.objects for page in pages) else inside:
                if (folder := _folder(name)) is not None:
                    folders[f"{folder}/"] = None
        return folders

    async def _pages(self, prefix: str, *, again: bool = False) -> list[Page]:
        """A whole listing of the store below; *again* says that its first page may be asked for again, too."""
        pages = [await self._page(prefix, None, RETRY_AFTER_S if again else ())]
        while (token := pages[-1].next_token) is not None:
            pages.append(await self._page(prefix, token, RETRY_AFTER_S))
            if sum(map(len, pages)) > MOST_FILES:
                raise StoreUnavailableError(f"/{prefix}: more than {MOST_FILES} names: too many for --layout hf-cache")
        return pages

    async def _page(self, prefix: str, token: str | None, pauses_s: Sequence[float]) -> Page:
        for pause_s in pauses_s:
            try:
                return await self.store.list_page(prefix, token=token)
            except StoreStalledError:
                raise
            except TransientStoreError:
                await trio.sleep(pause_s)
        return await self.store.list_page(prefix, token=token)

    async def _exists(self, repository: str) -> bool:
        if self._refs_of_hub is not None:
            return bool(await self._refs(repository))
        return (await self.store.list_page(f"{repository}/", limit=1)).exists

    async def _refs(self, repository: str) -> Mapping[str, str]:
        if self._refs_of_hub is None:
            files = await self._walk(f"{repository}/")
            return {"main": _fingerprint(files)} if files else {}
        refs = await self._refs_of_hub(repository)
        if refs:
            recent = self._recent.setdefault(repository, deque(maxlen=RECENT))
            if refs["main"] not in recent:
                recent.append(refs["main"])
        return refs

    async def _commits(self, repository: str) -> list[str]:
        """The commits that refs lead to, and recent ones of ``main``, which a hub still has."""
        refs = await self._refs(repository)
        return list(dict.fromkeys((*refs.values(), *self._recent.get(repository, ()))))

    async def _files(self, repository: str, commit: str) -> Files:
        """The files of a commit; none if there is no such commit."""
        if not _COMMIT.fullmatch(commit):
            return {}
        if self._refs_of_hub is None:
            files = await self._walk(f"{repository}/")
            return files if _fingerprint(files) == commit else {}
        files = self._trees.get(f"{repository}@{commit}") or await self._walk(self._root(repository, commit))
        if files:
            self._trees[f"{repository}@{commit}"] = files
        return files

    async def _walk(self, root: str) -> Files:
        """The files below a directory of the store below, by their paths there."""
        return await self._walks.of(root, partial(self._walked, root))

    async def _walked(self, root: str) -> Files:
        files, prefixes = Files(), [root]
        while prefixes:
            prefix = prefixes.pop()
            for page in await self._pages(prefix, again=prefix != root):
                files |= {file.key[len(root) :]: file for file in page.objects if _is_path(file.key)}
                files |= {key[len(root) :]: None for key in page.unreadable if _is_path(key)}
                prefixes += filter(_is_path, page.prefixes)
            if len(files) + len(prefixes) > MOST_FILES:
                raise StoreUnavailableError(f"/{root}: more than {MOST_FILES} files: too many for --layout hf-cache")
        return files

    def _snapshot(self, folder: str, commit: str, files: Files) -> Mapping[str, Entry]:
        return {
            (key := f"{folder}/snapshots/{commit}/{path}"): file
            and replace(file, key=key, linked=self._blob(folder, path, file) if self._share_links else None)
            for path, file in files.items()
        }

    def _blob(self, folder: str, path: str, file: Generation) -> str:
        """The path of a file's content below ``blobs``."""
        if self._refs_of_hub is not None:
            return f"{folder}/blobs/{file.etag}"
        name = repr((path, file.etag, file.size)).encode(errors="surrogateescape")
        return f"{folder}/blobs/{hashlib.sha1(name, usedforsecurity=False).hexdigest()}"


def _repository(folder: str) -> str | None:
    """The path in the store of a folder's repository; None if the folder is none."""
    match = _FOLDER.fullmatch(folder)
    path = "" if match is None else f"{_KINDS[match[1]]}{'/'.join(filter(None, match.group(2, 3)))}"
    return path if path and _is_path(path) else None


def _folder(place: str) -> str | None:
    """The folder of the repository at a prefix of the store; None if no folder can name it."""
    path = place.removesuffix("/")
    kind = next(kind for kind, start in reversed(_KINDS.items()) if path.startswith(start))
    folder = "--".join((kind, *path.removeprefix(_KINDS[kind]).split("/")))
    return folder if _repository(folder) == path else None


def _is_path(key: str) -> bool:
    """Whether a key or prefix can be a path: a link to one with ``..`` in it would lead elsewhere."""
    return {"", ".", ".."}.isdisjoint(key.removesuffix("/").split("/"))


def _level(paths: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    """The names in the directory *prefix*, whole; those of directories end in ``/``."""
    names = dict[str, Entry]()
    for path, entry in paths.items():
        if path.startswith(prefix) and path != prefix:
            name, slash, _ = path[len(prefix) :].partition("/")
            names[f"{prefix}{name}{slash}"] = None if slash else entry
    return names


def _fingerprint(files: Files) -> str:
    """An id of exactly these files, in the form of a commit's."""
    listed = sorted((path, file and (file.etag, file.size)) for path, file in files.items())
    return hashlib.sha1(repr(listed).encode(errors="surrogateescape"), usedforsecurity=False).hexdigest()
