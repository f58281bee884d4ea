"""Origins: which of a mount's stores each key comes from, and under which key."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class ByPath(Generic[T]):
    """One value for each store of a mount, by the path below which it is: ``a/b/``, or empty for all of the mount.

    Where one path lies below another, the longer one counts. *elsewhere* is the value of keys below no path.
    """

    def __init__(self, values: Mapping[str, T], *, elsewhere: T | None = None) -> None:
        self._values = {path: values[path] for path in sorted(values, key=len, reverse=True)}
        self._elsewhere = elsewhere
        self._only = values.get("") if len(values) == 1 else None

    def of(self, key: str) -> T:
        """The value of the store that an object or a directory (with its closing slash) comes from.

        Raises KeyError if there is neither a store nor a value for it.
        """
        if self._only is not None:
            return self._only
        path = self.path(key)
        if path is not None:
            return self._values[path]
        if self._elsewhere is None:
            raise KeyError(key)
        return self._elsewhere

    def path(self, key: str) -> str | None:
        """The path that a key is below; None if there is none."""
        return next((path for path in self._values if key.startswith(path)), None)

    def covers(self, key: str) -> bool:
        """Whether a key is below a path."""
        return self.path(key) is not None

    def near(self, key: str) -> list[T]:
        """The values of the store of a key and, for a directory, of all stores below it."""
        of_key = self.path(key)
        return [value for path, value in self.items() if path == of_key or path.startswith(key)]

    def map(self, function: Callable[[T], U]) -> "ByPath[U]":
        """What a function makes of each value, by the same paths."""
        elsewhere = None if self._elsewhere is None else function(self._elsewhere)
        return ByPath({path: function(value) for path, value in self.items()}, elsewhere=elsewhere)

    def items(self) -> Iterator[tuple[str, T]]:
        """The paths, in order, and their values."""
        return iter(sorted(self._values.items(), key=lambda item: item[0]))

    def values(self) -> list[T]:
        """The values of all stores, in the order of their paths."""
        return [value for _, value in self.items()]


def by_path(value: T | ByPath[T]) -> ByPath[T]:
    """The values by path; a single one is that of all keys."""
    return value if isinstance(value, ByPath) else ByPath({"": value})


class Origins:
    """What the cache calls the objects of a mount with several stores, as a mount of each store alone would.

    *stores* are by path: the identity of the store, and the part of a key that is not the store's own: mostly the path.
    """

    def __init__(self, stores: Mapping[str, tuple[str, str]]) -> None:
        self._stores = ByPath(stores, elsewhere=("", ""))
        self._bases = dict(reversed(self._stores.values()))
        self.identities = tuple(self._bases)

    def path(self, key: str) -> str | None:
        """The path of the store that a key comes from; None if there is none."""
        return self._stores.path(key)

    def locate(self, key: str) -> tuple[str, str]:
        """The identity of the store that a key comes from, and the store's own key."""
        identity, base = self._stores.of(key)
        return identity, key[len(base) :]

    def name(self, identity: str, key: str) -> str:
        """The mount's key of a store's own key, by the first of its paths; the same if it is none of the mount's."""
        return self._bases.get(identity, "") + key

    def relinked(self, key: str, linked: str | None) -> str | None:
        """`Generation.linked` of a key, from what a server recorded whose stores were perhaps at other paths.

        A link within a store stays as it was if the path of its file is gone: nothing tells where its own key begins.
        """
        if not self._stores.covers(key):
            return linked
        identity, own = self.locate(key)
        if linked is not None and self.locate(linked)[0] == identity:
            own = self.locate(linked)[1]
        elif linked is not None and not f"/{linked}".endswith(f"/{own}"):
            return linked
        file = self.name(identity, own)
        return None if file == key else file


def located(store: str | Origins, key: str) -> tuple[str, str]:
    """The identity of the store that a key of a mount comes from, and the store's own key."""
    return (store, key) if isinstance(store, str) else store.locate(key)
