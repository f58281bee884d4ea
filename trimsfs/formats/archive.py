"""Reads the member list of zip archives: ``.npz`` and PyTorch's files."""

import io
import struct
import zipfile

from trimsfs.formats.source import HEADER_LIMIT, Source
from trimsfs.formats.table import MOST_TENSORS, FormatError

MEMBER_LIMIT = 16 << 20
"""The most bytes of a member that a parser reads as a description of tensors."""
MOST_MEMBERS = MOST_TENSORS + (1 << 10)
MAGIC = b"PK\x03\x04"
_LISTED = b"PK\x01\x02"
"""Each member's entry in the list begins with this. zipfile ignores the count of members that the archive tells."""
_LOCAL_HEADER = 30
_ENCRYPTED = 1


class Archive:
    """The members of a zip archive. Raises FormatError for an invalid archive, and OSError from the source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        try:
            with zipfile.ZipFile(_File(source)) as archive:
                self._members = archive.infolist()
        # zipfile raises one of these for a truncated or malformed member list.
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
            raise FormatError(f"invalid zip archive: {error}") from None

    def members(self) -> list[zipfile.ZipInfo]:
        """All members, in the archive's order."""
        return self._members

    def span(self, member: zipfile.ZipInfo) -> range:
        """The offsets of a stored member's bytes in the file."""
        size = self._source.size
        if member.flag_bits & _ENCRYPTED:
            raise FormatError(f"member {member.filename!r} is encrypted")
        if not 0 <= member.header_offset <= size - _LOCAL_HEADER:
            raise FormatError(f"member {member.filename!r} lies outside the file")
        header = bytes(self._source.read(member.header_offset, _LOCAL_HEADER))
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = member.header_offset + _LOCAL_HEADER + name_length + extra_length
        if not header.startswith(MAGIC) or not start <= start + member.file_size <= size:
            raise FormatError(f"member {member.filename!r} lies outside the file")
        return range(start, start + member.file_size)

    def read(self, member: zipfile.ZipInfo) -> bytes:
        """The bytes of a stored member."""
        span = self.span(member)
        if len(span) > MEMBER_LIMIT:
            raise FormatError(f"member {member.filename!r} is longer than {MEMBER_LIMIT >> 20} MiB")
        return bytes(self._source.read(span.start, len(span)))


class _File(io.RawIOBase):
    """A source as a file object for zipfile, which may read at most HEADER_LIMIT bytes and MOST_MEMBERS members."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._offset = 0
        self._taken = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise ValueError("an offset is negative")
        self._offset = base + offset
        return self._offset

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size - self._offset)
        count = left if size < 0 else min(size, left)
        self._taken += count
        if self._taken > HEADER_LIMIT:
            raise ValueError(f"the member list exceeds {HEADER_LIMIT >> 20} MiB")
        data = bytes(self._source.read(self._offset, count)) if count else b""
        if data.count(_LISTED) > MOST_MEMBERS:  # before zipfile makes an object of each
            raise ValueError(f"more than {MOST_MEMBERS} members")
        self._offset += count
        return data
