"""Several stores as one: the objects of each lie below a path of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import trio

from trimsfs.errors import ObjectNotFoundError
from trimsfs.origins import ByPath, Origins
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, Store
from trimsfs.stores.digests import Digest
from trimsfs.types import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A store, and how its keys become those of the mount: by *base*, which ends in a slash, before them.

    *identity* is the store's in the cache.
    """

    store: Store
    base: str
    identity: str


class StoreRouter:
    """The stores of a mount, by the paths below which they are, such as ``a/b/``. No path lies below another.

    Directories above the paths exist, and so do the paths themselves, whatever the stores answer.
    """

    def __init__(self, stores: Mapping[str, Store]) -> None:
        self._routes = ByPath({path: Route(store=s, base=path, identity=s.identity) for path, s in stores.items()})
        self.origins = Origins({path: (route.identity, route.base) for path, route in self._routes.items()})

    def stores(self) -> list[tuple[str, Store]]:
        """The paths and their stores."""
        return [(path, route.store) for path, route in self._routes.items()]

    def replaced(self, replacement: Callable[[str, Store], Store]) -> "StoreRouter":
        """The same paths, with other instances of the same stores."""
        return StoreRouter({path: replacement(path, store) for path, store in self.stores()})

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
        return any(store.links for _, store in self.stores())

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
        return Page(
            objects=tuple(self._mounted(route, generation) for generation in page.objects),
            prefixes=tuple(route.base + below for below in page.prefixes),
            next_token=page.next_token,
            empty=page.empty or prefix == path,
            unreadable=tuple(route.base + key for key in page.unreadable),
        )

    def _above(self, prefix: str) -> Page:
        """A directory above the paths of stores."""
        below = {path[len(prefix) :].partition("/")[0] for path, _ in self.stores() if path.startswith(prefix)}
        return Page(objects=(), prefixes=tuple(f"{prefix}{name}/" for name in sorted(below)), next_token=None)

    async def stat(self, key: str) -> Generation:
        route = self._route(key)
        return self._mounted(route, await route.store.stat(key[len(route.base) :]))

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        route = self._route(generation.key)
        return await route.store.read(self._own(route, generation), offset, length, sink)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        route = self._route(generation.key)
        return await route.store.digest(self._own(route, generation), certain=certain)

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

    def _mounted(self, route: Route, generation: Generation) -> Generation:
        """A generation of a store, as the mount has it."""
        linked = None if generation.linked is None else route.base + generation.linked
        return replace(generation, key=route.base + generation.key, linked=linked)

    def _own(self, route: Route, generation: Generation) -> Generation:
        """A generation of the mount, as its store has it."""
        start = len(route.base)
        linked = None if generation.linked is None else generation.linked[start:]
        return replace(generation, key=generation.key[start:], linked=linked)


def stores_of(store: Store) -> list[tuple[str, Store]]:
    """The stores of a mount with their paths, the empty one if there is a single store."""
    return store.stores() if isinstance(store, StoreRouter) else [("", store)]


def store_of(store: Store, key: str) -> Store:
    """The store that a key comes from. Raises ObjectNotFoundError if there is none."""
    return store.store_of(key) if isinstance(store, StoreRouter) else store
