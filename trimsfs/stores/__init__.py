"""Where models come from."""

from pathlib import Path
from urllib.parse import urlsplit

from trimsfs.errors import ConfigurationError
from trimsfs.options import MountOptions
from trimsfs.stores.base import Page, Store
from trimsfs.stores.directory import DirectoryStore
from trimsfs.stores.fsspec import FsspecStore
from trimsfs.stores.retrying import RetryingStore
from trimsfs.stores.s3 import S3Store

__all__ = ["DirectoryStore", "FsspecStore", "Page", "RetryingStore", "S3Store", "Store", "open_store"]


def open_store(options: MountOptions, *, max_requests: int) -> Store:
    """The store that ``options.store`` names; *max_requests* reads may be under way at once.

    Raises ConfigurationError for a URL that names none.
    """
    url = options.store or ""
    parts = urlsplit(url)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise ConfigurationError(f"store {url}: no bucket: write s3://BUCKET[/PREFIX]")
        return S3Store(parts.netloc, parts.path, options, max_requests=max_requests)
    if parts.scheme == "file":
        return DirectoryStore(Path(parts.path))
    if "://" in url:
        return FsspecStore(url, max_requests=max_requests)
    if url:
        return DirectoryStore(Path(url))
    raise ConfigurationError("no store: write s3://BUCKET[/PREFIX] or a directory")
