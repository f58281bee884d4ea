"""A server with defects, for tests: in an order's ``server``, in place of ``trimsfs.daemon``.

Its fetch processes cannot compute a checksum, and it cannot list the directory ``unlisted``.
"""

from typing import Any, Never

from trimsfs.fetch.processes import thread_copier
from trimsfs.server import startup
from trimsfs.stores.s3 import S3Store


def _checksum(*_: object) -> Never:
    raise TypeError("a defect of a sink")


def _have_defects() -> None:
    vars(thread_copier)["crc32c"] = _checksum
    list_page: Any = S3Store._list

    def _list(store: S3Store, prefix: str, *arguments: object) -> object:
        if prefix == "unlisted/":
            raise LookupError("a defect of a store")
        return list_page(store, prefix, *arguments)

    S3Store._list = _list  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    _have_defects()
    startup.main()
