"""The digest of an object in S3's answers: a checksum header, or an ETag that is an MD5."""

import base64
import re
from collections.abc import Mapping

from trimsfs.stores.digests import Algorithm, Digest

_CHECKSUMS: tuple[Algorithm, ...] = ("crc64nvme", "crc32c", "crc32", "sha256", "sha1")
"""The fastest to compute first."""
_CHECKSUM = re.compile(r"((?:[A-Za-z0-9+/]{4})+(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?)(?:-([1-9][0-9]{0,4}))?")
_ETAG = re.compile(r'"?([0-9a-f]{32})(?:-([1-9][0-9]{0,4}))?"?')
_OTHER_ETAGS = ("aws:kms", "aws:kms:dsse")
"""Kinds of encryption whose ETags are no digests."""


def digest_of(headers: Mapping[str, str], *, etags: bool = True) -> Digest | None:
    """The digest in the answer to a HEAD request with ``ChecksumMode``; None if there is none.

    *etags* says whether an ETag may be one.
    """
    for algorithm in _CHECKSUMS:
        checksum = headers.get(f"x-amz-checksum-{algorithm}")
        if checksum is None:
            continue
        match = _CHECKSUM.fullmatch(checksum)
        if match is None:
            return None  # of a form that trimsfs cannot compute
        return Digest(algorithm=algorithm, value=base64.b64decode(match[1]), parts=int(match[2] or 0))
    encryption = headers.get("x-amz-server-side-encryption")
    customer_key = headers.get("x-amz-server-side-encryption-customer-algorithm")
    encrypted = encryption in _OTHER_ETAGS or customer_key is not None
    return None if encrypted or not etags else digest_by_etag(headers["etag"])


def digest_by_etag(etag: str) -> Digest | None:
    """The digest that an ETag most likely is; None if it does not look like one."""
    match = _ETAG.fullmatch(etag)
    if match is None:
        return None
    return Digest(algorithm="md5", value=bytes.fromhex(match[1]), parts=int(match[2] or 0), certain=False)
