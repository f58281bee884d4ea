"""Values that all layers share."""

import hashlib
import os
from dataclasses import dataclass

from trimsfs.origins import Origins, located

CHUNK_SIZE = 8 * 1024 * 1024
"""Bytes in a chunk, the unit of fetching and verification. The last chunk of an object is shorter."""
SIZE_MAX = 1 << 46
"""Bytes of the largest object that trimsfs shows, above what any store holds: records of chunks take memory."""
ETAG_MAX = 1024
"""Characters of the longest ETag."""
TARGET_MAX = 4095
"""Bytes of the longest target of a symbolic link, as in Linux."""

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRecord:
    """A chunk that is in a blob. ``crc`` is the CRC32C of its ``length`` bytes."""

    chunk: int
    length: int
    crc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One immutable content of an object: what a handle reads from its open to its release.

    ``size`` is in bytes, ``modified_ns`` in nanoseconds since the epoch. ``etag`` is the store's name for
    the content: another content of the same key has another one. ``version_id`` lets some stores
    serve a generation that has since been replaced; it is not part of the identity. ``linked`` is the key of the file
    that a symbolic link leads to: all links to a file have its content.
    """

    key: str
    etag: str
    size: int
    modified_ns: int
    version_id: str | None = None
    linked: str | None = None

    @property
    def file(self) -> str:
        """The key of the file whose content this is: another one for a link."""
        return self.linked or self.key

    @property
    def plausible(self) -> bool:
        """Whether a store can have such an object; callers drop entries that are not plausible."""
        visible = self.etag.isascii() and self.etag.isprintable() and self.etag.strip('"') != ""
        named = visible and len(self.etag) <= ETAG_MAX
        return named and 0 <= self.size <= SIZE_MAX

    def token(self, store: str | Origins) -> str:
        """A name for this content in its store: 32 hexadecimal digits, safe as a file name."""
        identity = "\0".join((*located(store, self.file), self.etag, str(self.size)))
        return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Symlink:
    """A symbolic link in the mount. The kernel follows its *target*, relative to the directory of *key*."""

    key: str
    target: str

    @property
    def plausible(self) -> bool:
        """Whether the kernel can follow it and stays in the mount; callers drop links that are not plausible."""
        try:
            return len(os.fsencode(self.target)) <= TARGET_MAX and "\0" not in self.target and self.leads_to is not None
        except UnicodeEncodeError:
            return False

    @property
    def leads_to(self) -> str | None:
        """The path of a file or directory in the store that it leads to; None if it may lead to the root or outside.

        ``..`` may only come first: after a name that is itself a link, it would lead elsewhere.
        """
        above, names = self.key.split("/")[:-1], self.target.split("/")
        while names[0] == ".." and above and len(names) > 1:
            del above[-1], names[0]
        if names[0] == "" or ".." in names:
            return None
        return "/".join([*above, *(name for name in names if name not in {"", "."})]) or None
