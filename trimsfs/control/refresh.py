"""Refresh: makes the server ask the store about names that it knows already."""

from collections.abc import Callable, Iterable

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.namespace.tree import Namespace


async def refresh(namespace: Namespace, expire: Callable[[Iterable[tuple[int, bytes]]], None], path: str) -> None:
    """Make the next lookup of a path, or of a name below it, ask the store. *expire* makes the kernel look them up.

    While the store does not answer, lookups return what is known.
    """
    namespace.mark_outdated(path.removesuffix("/"))
    namespace.expire(path)
    names = namespace.inodes.known_names_below(path)
    await in_thread(expire, names, abandon_on_cancel=True)
