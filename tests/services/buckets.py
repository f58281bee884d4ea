"""The directories that the fast endpoint serves as buckets: the paths of keys, listings in order, and digests.

The listing of a directory is kept until its modification time changes, which a file written in place does not do.
Directories that hold nothing are listed, unlike in S3. Digests are told only of files that have been `uploaded`.
"""

import base64
import hashlib
import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from xml.sax.saxutils import escape

from trimsfs.stores import digests

PART_SIZE = 8 << 20
"""Of the AWS command line, and of what it uploads in one."""
ETAG, CHECKSUM = "user.etag", "user.crc64nvme"
COPIES = "user.copies"


class S3Error(Exception):
    """An answer other than success."""

    def __init__(self, status: HTTPStatus, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


def uploaded(path: Path) -> None:
    """Have an endpoint tell of a file what S3 would had the AWS command line uploaded it: a CRC64NVME of the whole, and
    an ETag that is the MD5 of the bytes, or of the MD5s of its parts. The file must not change any more."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        parts = -(-size // PART_SIZE) if size >= PART_SIZE else 0
        md5 = digests.compute(file.fileno(), size, "md5", PART_SIZE if parts else 0) or b""
        crc = digests.compute(file.fileno(), size, "crc64nvme", 0) or b""
    os.setxattr(path, ETAG, f'"{md5.hex()}{f"-{parts}" if parts else ""}"'.encode())
    os.setxattr(path, CHECKSUM, base64.b64encode(crc))


def copied(directory: Path, file: Path, count: int) -> None:
    """Have an endpoint serve a directory as though it also held *count* copies of a file: `copy_name` of each number.

    They exist only in its answers, so that a million of them take a moment and next to no disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    os.setxattr(directory, COPIES, f"{count} {file}".encode())


def copy_name(number: int) -> str:
    """The name of one of the copies in a directory."""
    return f"{number:07}"


@dataclass(frozen=True, slots=True)
class _Listing:
    """Sorted names in a directory, those of directories ending in ``/``, and what XML says of each after its key."""

    modified_ns: int
    names: list[str]
    details: list[str]


@dataclass(slots=True)
class Buckets:
    """The directories in *root*."""

    root: Path
    _listings: dict[str, _Listing] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, bucket: str) -> None:
        """Raise NoSuchBucket unless there is one."""
        if bucket in {"", ".", ".."} or not (self.root / bucket).is_dir():
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchBucket")

    def path(self, bucket: str, key: str) -> str:
        """Where an object or directory would be; empty, which opens nothing, for a key that no path can have."""
        parts = key.removesuffix("/").split("/") if key else []
        possible = "\0" not in key and not {"", ".", ".."} & set(parts)
        return f"{self.root}/{bucket}/{key}" if possible else ""

    def open(self, bucket: str, key: str) -> int:
        """A descriptor of an object's file. Raises NoSuchKey."""
        path = self.path(bucket, key)
        try:
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                directory, _, name = path.rpartition("/")
                count, file = _copies(directory)
                if not (name.isdecimal() and int(name) < count and name == copy_name(int(name))):
                    raise
                return os.open(file, os.O_RDONLY)
        except OSError:
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchKey") from None

    def items(self, bucket: str, prefix: str, after: str, *, deep: bool) -> Iterator[tuple[str, str]]:
        """Keys with a prefix in order, those after *after*, and their details; none of a common prefix."""
        base = prefix[: prefix.rfind("/") + 1]
        listing = self._listing(self.path(bucket, base))
        names = listing.names
        begin = bisect_left(names, prefix[len(base) :])
        if not deep and after.startswith(base):
            begin = max(begin, bisect_right(names, after[len(base) :]))
        for number in range(begin, len(names)):
            key = base + names[number]
            if not key.startswith(prefix):
                return
            if deep and key.endswith("/"):
                yield from self.items(bucket, key, after, deep=True)
            elif key > after:
                yield key, listing.details[number]

    def _listing(self, path: str) -> _Listing:
        try:
            modified_ns = os.stat(path).st_mtime_ns
            with self._lock:
                listing = self._listings.get(path)
                if listing is None or listing.modified_ns != modified_ns:
                    listing = self._listings[path] = _listed(path, modified_ns)
        except (FileNotFoundError, NotADirectoryError):
            return _Listing(0, [], [])
        return listing


def _listed(path: str, modified_ns: int) -> _Listing:
    found = {}
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                found[f"{entry.name}/"] = ""
                continue
            found[entry.name] = _details(entry.path, entry.stat())
    count, file = _copies(path)
    if count:
        found |= dict.fromkeys(map(copy_name, range(count)), _details(file, os.stat(file)))
    names = sorted(found)
    return _Listing(modified_ns, names, [found[name] for name in names])


def _details(path: str, facts: os.stat_result) -> str:
    modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(facts.st_mtime))
    return (
        f"<LastModified>{modified}</LastModified><ETag>{escape(etag(path, facts))}</ETag>"
        f"<Size>{facts.st_size}</Size><StorageClass>STANDARD</StorageClass>"
    )


def _copies(directory: str) -> tuple[int, str]:
    """How many files a directory also holds by `copied`, and of which they are copies."""
    count, _, file = (told(directory, COPIES) or "0 ").partition(" ")
    return int(count), file


def told(file: int | str, name: str) -> str | None:
    """What is to be told of a file that has been `uploaded`."""
    try:
        return os.getxattr(file, name).decode()
    except OSError:
        return None


def etag(file: int | str, facts: os.stat_result) -> str:
    """The ETag of a file."""
    uploaded_as = told(file, ETAG)
    if uploaded_as is not None:
        return uploaded_as
    digest = hashlib.md5(f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns}".encode(), usedforsecurity=False)
    # Of a form that no client takes for a digest of the content, whole or in parts, and compares with it.
    return f'"fast-{digest.hexdigest()}"'
