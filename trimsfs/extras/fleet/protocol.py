"""What the members of a fleet say to each other: a request for chunks of a generation, and the headers of its answer.

An asker names the content by a token and the key that the mount shows, never by a URL. The owner looks the key up in
its own store, by its own rights. It answers only if its generation gives the same token.

=====  ======================================================================================
206    the bytes, with the CRC32C of each of their chunks
403    the asker has no certificate of the fleet's CA (nginx)
404    not here, of a request that is cached only; or this owner cannot fetch it, or has no room
409    the owner's store has another generation
421    the asker is the owner itself, whose address is translated
502    no server answers the owner's nginx (nginx)
503    busy, or the store does not answer; members that have the bytes, if the owner knows some. With Retry-After:
       drained or off
=====  ======================================================================================

A HEAD request has the owner fetch the chunks and sends none. One that is cached only asks whether the owner is alive:
the answer is 404.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

from trimsfs.types import Generation

KEY, ASKER, INSTANCE = "trimsfs-key", "trimsfs-asker", "trimsfs-instance"
CRCS, HOLDERS = "trimsfs-crc32c", "trimsfs-holders"
"""Names of headers, in lower case, as parsers give them."""
CACHED_ONLY, RETRY_AFTER = "only-if-cached", "retry-after"
AWAY_S = 10
"""For how many seconds a member that is drained or off is not asked."""
KEY_LIMIT = 4096
"""Bytes of the longest key."""
CHUNKS_LIMIT = 16
"""Most chunks in one request."""
_TARGET = re.compile(r"/c/(?P<fleet>[A-Za-z0-9][A-Za-z0-9._-]{0,62})/(?P<token>[0-9a-f]{64})")
_RANGE = re.compile(r"bytes=(?P<first>\d{1,15})-(?P<last>\d{1,15})")
_CRC = re.compile(r"[0-9a-f]{8}")
_INSTANCE = re.compile(r"[0-9a-f]{16}")
_MEMBER = re.compile(r"[A-Za-z0-9._\-\[\]:]{1,280}")


class ProtocolError(ValueError):
    """A request or an answer that no member sends."""


def fleet_token(fleet: str, generation: Generation, chunk_size: int) -> str:
    """The name of a content in the fleet: 64 hexadecimal digits, the same on every member.

    Of a generation it takes what tells its content: the file's key on the mount, ETag and size. Times differ between
    the answers of one store, and only some of them tell a version.
    """
    identity = "\0".join((fleet, generation.file, generation.etag, str(generation.size), str(chunk_size)))
    return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRequest:
    """A request for the bytes ``[start, stop)`` of a generation, which begin with a chunk.

    ``key`` is the file's on the mount. With ``cached_only``, the owner asks neither another member nor the store.
    ``asker`` is the member that asks, as the list of members has it, or empty: the owner may name it to others. Its
    server's ``instance``, by which an owner knows its own requests, may be empty as well.
    """

    fleet: str
    token: str
    key: str
    start: int
    stop: int
    cached_only: bool = False
    asker: str = ""
    instance: str = ""

    @property
    def target(self) -> str:
        """The path of its URL."""
        return f"/c/{self.fleet}/{self.token}"

    @property
    def headers(self) -> dict[str, str]:
        headers = {
            KEY: quote_from_bytes(self.key.encode(errors="surrogateescape")),
            "range": f"bytes={self.start}-{self.stop - 1}",
        }
        if self.asker:
            headers[ASKER] = self.asker
        if self.instance:
            headers[INSTANCE] = self.instance
        return {**headers, "cache-control": CACHED_ONLY} if self.cached_only else headers


def parse_request(target: str, headers: Mapping[str, str]) -> ChunkRequest:
    """The request with this path and these headers, whose names are in lower case. Raises ProtocolError."""
    path = _TARGET.fullmatch(target)
    if path is None:
        raise ProtocolError("no path of a fleet's request")
    span = _RANGE.fullmatch(headers.get("range", ""))
    if span is None or int(span["first"]) > int(span["last"]):
        raise ProtocolError("no range of bytes")
    key = unquote_to_bytes(headers.get(KEY, ""))
    if not key or len(key) > KEY_LIMIT or b"\0" in key:
        raise ProtocolError("no key")
    return ChunkRequest(
        fleet=path["fleet"],
        token=path["token"],
        key=key.decode(errors="surrogateescape"),
        start=int(span["first"]),
        stop=int(span["last"]) + 1,
        cached_only=headers.get("cache-control") == CACHED_ONLY,
        asker=asker if _MEMBER.fullmatch(asker := headers.get(ASKER, "")) else "",
        instance=instance if _INSTANCE.fullmatch(instance := headers.get(INSTANCE, "")) else "",
    )


def format_crcs(crcs: Sequence[int]) -> str:
    """The header that tells the CRC32C of each chunk."""
    return ",".join(f"{crc:08x}" for crc in crcs)


def parse_crcs(value: str) -> list[int]:
    """The CRC32C of each chunk. Raises ProtocolError."""
    parts = value.split(",")
    if not all(_CRC.fullmatch(part) for part in parts):
        raise ProtocolError("no CRC32C of chunks")
    return [int(part, 16) for part in parts]


def parse_holders(value: str) -> list[str]:
    """The members that an owner says have the bytes; what is none is left out."""
    return [part for part in value.split(",") if _MEMBER.fullmatch(part)]
