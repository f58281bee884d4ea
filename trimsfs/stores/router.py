"""Several stores as one: the objects of each lie below a path of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter

import trio

from trimsfs.errors import ObjectNotFoundError
from trimsfs.origins import ByPath, Origins
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, Store
from trimsfs.stores.digests import Digest
from trimsfs.types import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A store, and how its keys become those of the mount: by *base*, empty or with a closing slash, before them.

    *identity* is the store's in the cache. Routes of one identity show the same objects, each once. *first* is the base
    of the route that names their contents; the names of the others are links to these.
    """

    store: Store
    base: str
    identity: str
    first: str

    def mounted(self, generation: Generation) -> Generation:
        """A generation of the store, as the mount has it."""
        key, linked = self.base + generation.key, self.first + generation.file
        return replace(generation, key=key, linked=None if linked == key else linked)

    def own(self, generation: Generation) -> Generation:
        """A generation of the mount, as the store has it."""
        key, file = generation.key[len(self.base) :], generation.key[len(self.base) :]
        if generation.linked is not None:
            file = generation.linked[len(self.first) :]
        return replace(generation, key=key, linked=None if file == key else file)


class StoreRouter:
    """The stores of a mount, by the paths below which they are, such as ``a/b/``. The longest path of a key counts.

    Directories above the paths exist, and so do the paths themselves, whatever the stores answer. A store with the
    credentials of a tenant may be that of a path above: *bases* has the path at which its keys begin. A store's cache
    may be apart from those of the same objects: *identities* has its name there.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        *,
        bases: Mapping[str, str] | None = None,
        identities: Mapping[str, str] | None = None,
    ) -> None:
        self._stores, self._bases, self._identities = stores, bases or {}, identities or {}
        routes, first = dict[str, Route](), dict[str, str]()
        for path, store in sorted(stores.items(), key=itemgetter(0)):
            base, identity = self._bases.get(path, path), self._identities.get(path, store.identity)
            routes[path] = Route(store=store, base=base, identity=identity, first=first.setdefault(identity, base))
        self._routes = ByPath(routes)
        self.origins = Origins({path: (route.identity, route.base) for path, route in routes.items()})

    def stores(self) -> list[tuple[str, Store]]:
        """The paths and their stores."""
        return [(path, route.store) for path, route in self._routes.items()]

    def replaced(self, replacement: Callable[[str, Store], Store]) -> "StoreRouter":
        """The same paths, with other instances of the same stores."""
        stores = {path: replacement(path, store) for path, store in self.stores()}
        return StoreRouter(stores, bases=self._bases, identities=self._identities)

    @property
    def identity(self) -> str:
        return "\n".join(f"{path} {route.identity}" for path, route in self._routes.items())

    @property
    def streaming(self) -> bool:
        return all(store.streaming for _, store in self.stores())

    @property
    def forkable(self) -> bool:
        return all(store.forkable for _, store in self.stores())

    @property
    def links(self) -> bool:
        several = len({route.identity for route in self._routes.values()}) < len(self.stores())
        return several or any(store.links for _, store in self.stores())

    async def probe(self) -> None:
        for _, store in self.stores():
            await store.probe()

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        path = self._routes.path(prefix)
        if path is None:
            await trio.lowlevel.checkpoint()
            return self._above(prefix)
        route = self._routes.of(prefix)
        page = await route.store.list_page(prefix[len(route.base) :], token=token, limit=limit)
        return replace(
            page,
            objects=tuple(map(route.mounted, page.objects)),
            prefixes=tuple(route.base + below for below in page.prefixes),
            empty=page.empty or prefix == path,
            unreadable=tuple(route.base + key for key in page.unreadable),
            symlinks=tuple(replace(link, key=route.base + link.key) for link in page.symlinks),
            symlink=None if page.symlink is None else replace(page.symlink, key=route.base + page.symlink.key),
        )

    def _above(self, prefix: str) -> Page:
        """A directory above the paths of stores."""
        below = {path[len(prefix) :].partition("/")[0] for path, _ in self.stores() if path.startswith(prefix)}
        return Page(objects=(), prefixes=tuple(f"{prefix}{name}/" for name in sorted(below)), next_token=None)

    async def stat(self, key: str) -> Generation:
        route = self._route(key)
        return route.mounted(await route.store.stat(key[len(route.base) :]))

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        route = self._route(generation.key)
        return await route.store.read(route.own(generation), offset, length, sink)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        route = self._route(generation.key)
        return await route.store.digest(route.own(generation), certain=certain)

    async def aclose(self) -> None:
        for _, store in self.stores():
            await store.aclose()

    def store_of(self, key: str) -> Store:
        """The store that a key comes from. Raises ObjectNotFoundError if there is none."""
        return self._route(key).store

    def _route(self, key: str) -> Route:
        if not self._routes.covers(key):
            raise ObjectNotFoundError(f"{key}: no store has objects there")
        return self._routes.of(key)


def stores_of(store: Store) -> list[tuple[str, Store]]:
    """The stores of a mount with their paths, the empty one if there is a single store."""
    return store.stores() if isinstance(store, StoreRouter) else [("", store)]


def store_of(store: Store, key: str) -> Store:
    """The store that a key comes from. Raises ObjectNotFoundError if there is none."""
    return store.store_of(key) if isinstance(store, StoreRouter) else store
