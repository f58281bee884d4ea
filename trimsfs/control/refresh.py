"""Has the store asked for names, whatever is known of them."""

from collections.abc import Callable, Iterable

import trio

from trimsfs.namespace.tree import Namespace


async def refresh(namespace: Namespace, expire: Callable[[Iterable[tuple[int, bytes]]], None], path: str) -> None:
    """Ask the store at the next lookup of a path, or of what lies below it; *expire* has the kernel look it up.

    While the store does not answer, what is known goes on to count.
    """
    namespace.mark_outdated(path.removesuffix("/"))
    namespace.expire(path)
    names = namespace.inodes.known_names_below(path)
    await trio.to_thread.run_sync(expire, names, abandon_on_cancel=True)
