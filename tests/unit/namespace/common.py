"""What the tests of the namespace have in common."""

from collections.abc import Callable

from tests.support.stores import MemoryStore, as_store
from trimsfs.errors import StoreUnavailableError
from trimsfs.namespace.listing import Entry
from trimsfs.namespace.tree import Namespace
from trimsfs.types import Generation

TTL_S = 60.0


def down() -> StoreUnavailableError:
    """What a store says that cannot be reached."""
    return StoreUnavailableError("the store is down")


def namespace_of(
    store: MemoryStore, *, ttl_s: float = TTL_S, unlisted: Callable[[str], None] = lambda _: None
) -> Namespace:
    return Namespace(as_store(store), ttl_s=ttl_s, unlisted=unlisted)


async def look(namespace: Namespace, path: str) -> Entry:
    """What a path is."""
    prefix, slash, name = path.rpartition("/")
    entry, left = await namespace.lookup(prefix + slash, name.encode())
    assert left > 0
    return entry


def a_generation(key: str, etag: str = '"x"') -> Generation:
    return Generation(key=key, etag=etag, size=1, modified_ns=0)
