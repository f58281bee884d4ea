"""Objects of a bucket whose content anybody can tell by name and size, also of one that is replaced again and again."""

import contextlib
import io
import random
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from tests.services import S3Server

PAGE = 4096
_HEADER = struct.Struct("<IIQ")
_FILLING = random.Random(1).randbytes(1 << 20)
_UPLOADS = 8


def content(name: str, version: int, offset: int, count: int) -> bytes:
    """Bytes of a version of an object that is long enough: no page is the same in another place, version or object."""
    mark = zlib.crc32(name.encode())
    first, last = offset // PAGE, (offset + count - 1) // PAGE
    pages: list[bytes] = []
    for page in range(first, last + 1):
        start = (mark + version * 7919 + page * 40503) % (len(_FILLING) - PAGE)
        pages += (_HEADER.pack(mark, version, page), _FILLING[start : start + PAGE - _HEADER.size])
    return b"".join(pages)[offset - first * PAGE :][:count]


class Objects:
    """The objects of a bucket, and what readers may find of them.

    A version is as many bytes longer than the first as its number, so that its size tells which it is. *directory*
    has a file for each object, which is as long as there were versions; it is written before the bucket is.
    """

    def __init__(self, directory: Path, bucket: str, sizes: dict[str, int]) -> None:
        self._directory = directory
        self._bucket = bucket
        self.sizes = sizes

    def names(self, prefix: str = "") -> list[str]:
        """Those whose name begins like this, in order."""
        return sorted(name for name in self.sizes if name.startswith(prefix))

    def size(self, name: str) -> int:
        """Bytes of the newest version."""
        return self.sizes[name] + self._versions(name) - 1

    def expected(self, name: str, size: int, offset: int, count: int) -> bytes | None:
        """Bytes of the version that has this size; None if there was none."""
        version = size - self.sizes[name]
        if not 0 <= version < self._versions(name):
            return None
        return content(name, version, offset, min(count, size - offset))

    def put(self, client: "S3Client", name: str, *, in_parts: bool = False) -> None:
        """Make an object, or replace it by its next version. Of one that comes *in parts* the ETag is no MD5."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b".")
        size = self.size(name)
        body = content(name, size - self.sizes[name], 0, size)
        if in_parts:
            client.upload_fileobj(io.BytesIO(body), self._bucket, name)
        else:
            client.put_object(Bucket=self._bucket, Key=name, Body=body)

    def delete(self, client: "S3Client", name: str) -> None:
        """Delete an object; what was open of it may still be read."""
        client.delete_object(Bucket=self._bucket, Key=name)

    def put_all(self, server: "S3Server", names: Iterable[str], *, in_parts: bool = False) -> None:
        with contextlib.closing(server.client()) as client, ThreadPoolExecutor(_UPLOADS) as pool:
            list(pool.map(partial(self.put, client, in_parts=in_parts), names))

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.versions"

    def _versions(self, name: str) -> int:
        return self._path(name).stat().st_size
