"""Stores: where models come from, behind one protocol; S3, OCI, a directory, fsspec, and a retrying wrapper."""

import logging
import re
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trimsfs.errors import BucketNotFoundError, ConfigurationError
from trimsfs.options import MountOptions
from trimsfs.stores.base import Page, Store
from trimsfs.stores.directory import DirectoryStore
from trimsfs.stores.fsspec import FsspecStore
from trimsfs.stores.retrying import Retrying, RetryingStore

__all__ = ["DirectoryStore", "FsspecStore", "Page", "Retrying", "RetryingStore", "Store", "open_store", "reach"]

log = logging.getLogger(__name__)

_ACCESS_POINT = re.compile(
    r"arn:aws[a-z-]*:s3(?:-outposts)?:[a-z0-9-]*:[0-9]{12}:"
    r"(?:outpost[/:][A-Za-z0-9-]+[/:])?accesspoint[/:][A-Za-z0-9.-]+(?=/|\Z)"
)
"""The ARN of an access point in one region or several, or on Outposts. It may hold slashes."""


def open_store(options: MountOptions, *, max_requests: int) -> Store:
    """The store that ``options.store`` names; *max_requests* reads may be under way at once.

    Raises ConfigurationError when the URL names no store.
    """
    url = options.store or ""
    share_links = options.signatures == "off"  # else a file signed at one path could be opened at others
    if url.startswith("s3://"):
        bucket, prefix = _bucket(url)
        from trimsfs.stores.s3 import S3Store  # noqa: PLC0415 - boto3 is slow to load, and other stores do not need it

        return S3Store(bucket, prefix, options, max_requests=max_requests)
    if url.startswith("oci://"):
        from trimsfs.stores.oci import OciStore  # noqa: PLC0415 - other stores do not need it

        return OciStore(url, options, max_requests=max_requests)
    if url.startswith("file://"):
        return DirectoryStore(Path(unquote(urlsplit(url).path)), share_links=share_links)
    if "://" in url:
        return FsspecStore(url, max_requests=max_requests)
    if url:
        return DirectoryStore(Path(url), share_links=share_links)
    raise ConfigurationError("no store: write s3://BUCKET[/PREFIX] or a directory")


def _bucket(url: str) -> tuple[str, str]:
    """The bucket, or the ARN of an access point, and the prefix in an S3 URL. Raises ConfigurationError."""
    # Not parsed as a URL: a prefix may hold any character.
    rest = url.removeprefix("s3://")
    access_point = _ACCESS_POINT.match(rest)
    if access_point is not None:
        return access_point[0], rest[access_point.end() + 1 :]
    bucket, _, prefix = rest.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket):
        form = "arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME" if bucket.startswith("arn:") else "BUCKET"
        raise ConfigurationError(f"store {url!r}: {bucket!r} is not a bucket name: write s3://{form}[/PREFIX]")
    return bucket, prefix


async def reach(store: Store, options: MountOptions, *, deadline_s: float) -> None:
    """Check that a store answers and exists; a prefix exists if it holds an object.

    Raises BucketNotFoundError, for an empty prefix only without ``options.allow_empty``, and the errors of `Store`.
    """
    retrying = Retrying(deadline_s=deadline_s, on_failure=None)
    await retrying.call("no answer", store.probe)
    page = await retrying.call("no answer", partial(store.list_page, "", limit=1))
    if page.exists:
        return
    if options.allow_empty:
        log.warning("%s: there is nothing under it", options.store)
    else:
        raise BucketNotFoundError(f"{options.store}: there is nothing under it: check the spelling, or --allow-empty")
