"""Stores: where models come from, behind one protocol: S3, clouds, hubs, OCI, a directory, fsspec; layouts; retries."""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from trimsfs.errors import BucketNotFoundError, ConfigurationError, StoreNotTrustedError, StoreUnavailableError
from trimsfs.extras.stores.fsspec import FsspecStore
from trimsfs.options import MountOptions, Place, places
from trimsfs.stores.base import Page, Store
from trimsfs.stores.directory import DirectoryStore
from trimsfs.stores.hf_cache import HfCacheStore
from trimsfs.stores.retrying import Retrying, RetryingStore
from trimsfs.stores.router import StoreRouter
from trimsfs.stores.versioned import VersionedStore

__all__ = [
    "DirectoryStore",
    "FsspecStore",
    "HfCacheStore",
    "Page",
    "Retrying",
    "RetryingStore",
    "Store",
    "StoreRouter",
    "Writer",
    "after_fork",
    "beneath",
    "max_requests_each",
    "open_store",
    "open_writer",
    "probe",
    "reach",
    "reach_place",
    "routed",
    "unreachable",
]

if TYPE_CHECKING:
    from trimsfs.stores.writer import Writer

log = logging.getLogger(__name__)

CLOUDS = ("gs://", "gcs://", "az://", "abfs://", "abfss://")
"""How the URLs of cloud stores begin."""
_ACCESS_POINT = re.compile(
    r"arn:aws[a-z-]*:s3(?:-outposts)?:[a-z0-9-]*:[0-9]{12}:"
    r"(?:outpost[/:][A-Za-z0-9-]+[/:])?accesspoint[/:][A-Za-z0-9.-]+(?=/|\Z)"
)
"""The ARN of an access point in one region or several, or on Outposts. It may hold slashes."""
LEAST_REQUESTS = 4
"""Fewest requests to one of several stores, however many they are."""


def open_store(options: MountOptions, *, max_requests: int) -> Store:
    """The store that ``options.store`` names, in its layout, or the several of ``options.stores``.

    *max_requests* reads may be under way at once; each of several has a share. Raises ConfigurationError when a URL
    names no store.
    """
    found = places(options)
    if [place.path for place in found] != [""]:
        each = max_requests_each(max_requests, len(found))
        return routed(found, {place.path: _open_place(place, each) for place in found})
    share_links = options.signatures == "off"  # else a file signed at one path could be opened at others
    if (options.store or "").startswith("hf://"):
        return _open_hub(options, max_requests, share_links)
    store = _open(options, max_requests, share_links)
    if options.layout == "plain":
        return store
    return HfCacheStore(VersionedStore(store), None, share_links=share_links)  # shows no unfinished version


def _open_place(place: Place, max_requests: int) -> Store:
    try:
        return open_store(place.options, max_requests=max_requests)
    except ConfigurationError as error:
        raise ConfigurationError(f"{place.table}{error}") from error


def beneath(store: Store) -> Store:
    """The store that a layout shows; any other store is itself."""
    while isinstance(store, HfCacheStore | VersionedStore):
        store = store.store
    return store


def _open_hub(options: MountOptions, max_requests: int, share_links: bool) -> Store:
    url = options.store or ""
    try:
        from trimsfs.extras.stores.huggingface import HubStore  # noqa: PLC0415 - an extra, wanted only here
    except ImportError as error:
        raise ConfigurationError(f"store {url}: {error}: pip install 'trimsfs[hf]'") from error
    plain = options.layout == "plain"
    hub = HubStore(url, options, max_requests=max_requests, whole=not plain)
    return hub if plain else HfCacheStore(hub, hub.refs, share_links=share_links)


def _open(options: MountOptions, max_requests: int, share_links: bool) -> Store:
    url = options.store or ""
    if url.startswith("s3://"):
        bucket, prefix = _bucket(url)
        from trimsfs.stores.s3 import S3Store  # noqa: PLC0415 - boto3 is slow to load, and other stores do not need it

        return S3Store(bucket, prefix, options, max_requests=max_requests)
    if url.startswith("oci://"):
        from trimsfs.extras.stores.oci import OciStore  # noqa: PLC0415 - other stores do not need it

        return OciStore(url, options, max_requests=max_requests)
    if url.startswith("file://"):
        return DirectoryStore(Path(unquote(urlsplit(url).path)), share_links=share_links)
    if url.startswith(CLOUDS):
        from trimsfs.extras.stores.cloud import open_cloud  # noqa: PLC0415 - likewise urllib3

        return open_cloud(url, options, max_requests=max_requests)
    if "://" in url:
        _check_scheme(url)
        return FsspecStore(url, max_requests=max_requests)
    if url:
        return DirectoryStore(Path(url), share_links=share_links)
    raise ConfigurationError("no store: write s3://BUCKET[/PREFIX] or a directory")


def _check_scheme(url: str) -> None:
    """Refuse a URL that is most likely meant for S3. Raises ConfigurationError, which has what to write instead."""
    scheme, _, rest = url.partition("://")
    if scheme != scheme.lower():
        raise ConfigurationError(f"store {url}: a scheme is in lower case: write {scheme.lower()}://{rest}")
    if scheme in {"http", "https"} and find_spec("fsspec") is None:
        host, _, path = rest.partition("/")
        bucket = path.rstrip("/") or "BUCKET[/PREFIX]"
        raise ConfigurationError(
            f"store {url}: a server of S3 is no store: write s3://{bucket} with --endpoint-url {scheme}://{host}; for "
            "files of a web server, pip install 'trimsfs[fsspec]'"
        )


def open_writer(options: MountOptions, *, scratch: str, max_requests: int, conditions: bool = True) -> "Writer":
    """A writer of the store that ``options.store`` names; *max_requests* may be under way at once.

    In a directory, files are written below the key *scratch*. Without *conditions*, a bucket is written to without any.
    Raises ConfigurationError when the URL names no store that trimsfs can write to.
    """
    url = options.store or ""
    if url.startswith("s3://"):
        bucket, prefix = _bucket(url)
        from trimsfs.stores.s3.writer import S3Writer  # noqa: PLC0415 - likewise

        return S3Writer(bucket, prefix, options, max_requests=max_requests, conditions=conditions)
    root = directory_of(url)
    if root is None:
        raise ConfigurationError(f"store {url}: trimsfs cannot write to it: write s3://BUCKET[/PREFIX] or a directory")
    from trimsfs.stores.directory_writer import DirectoryWriter  # noqa: PLC0415 - servers write nothing

    return DirectoryWriter(root.absolute(), scratch=scratch, max_requests=max_requests)


def directory_of(url: str) -> Path | None:
    """The directory that a URL or path names; None for other stores."""
    if url.startswith("file://"):
        return Path(unquote(urlsplit(url).path))
    return None if "://" in url else Path(url)


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


def routed(found: Sequence[Place], stores: Mapping[str, Store]) -> StoreRouter:
    """The *stores* of several places, by path. A tenant with credentials has a cache of its own, unless it shares.

    Raises ConfigurationError for a store that the operator has at two places with different credentials.
    """
    identities, whose = dict[str, str](), dict[str, Place]()
    for place in found:
        identity = stores[place.path].identity
        if place.tenant is not None and not place.tenant.share_cache:
            identities[place.path] = f"{identity}|tenant {place.tenant.path}"
        elif place.tenant is None and (first := whose.setdefault(identity, place)) is not place:
            if credentials(first.options) != credentials(place.options):
                raise ConfigurationError(
                    f"[[store]] path {place.path[:-1]}: {first.path[:-1]} has the same store with other credentials: "
                    "write them into [[tenants]]"
                )
            if place.options.signatures != "off":  # a file signed at one path could be opened at the other
                identities[place.path] = f"{identity}|path {place.path}"
    return StoreRouter(stores, bases={place.path: place.base for place in found}, identities=identities)


def credentials(options: MountOptions) -> tuple[object, ...]:
    """What tells whose credentials a store uses."""
    return options.profile, options.role_arn, options.web_identity_token_file, options.anonymous


def after_fork(store: Store, options: MountOptions, *, max_requests: int) -> Store:
    """The same store for a forked process: what does not work there is opened anew."""
    if isinstance(store, StoreRouter):
        own = {place.path: place.options for place in places(options)}
        each = max_requests_each(max_requests, len(own))
        return store.replaced(lambda path, part: after_fork(part, own[path], max_requests=each))
    return store if store.forkable else open_store(options, max_requests=max_requests)


def max_requests_each(max_requests: int, stores: int) -> int:
    """The most requests to each of several stores: a store that is slow, or away, leaves the others theirs."""
    return max(min(LEAST_REQUESTS, max_requests), max_requests // stores)


async def reach(store: Store, options: MountOptions, *, deadline_s: float) -> bool:
    """Check that a store answers and exists; a prefix exists if it holds an object. Returns whether there is any.

    Raises BucketNotFoundError, for an empty prefix only without ``options.allow_empty``, and the errors of `Store`.
    """
    retrying = Retrying(deadline_s=deadline_s, on_failure=None)
    await retrying.call("no answer", store.probe)
    page = await retrying.call("no answer", partial(store.list_page, "", limit=1))
    if not page.exists and not options.allow_empty:
        raise BucketNotFoundError(f"{options.store}: there is nothing under it: check the spelling, or --allow-empty")
    if not page.exists:
        log.warning("%s: there is nothing under it: check the spelling if you expect objects", options.store)
    return page.exists


def unreachable(error: StoreUnavailableError, endpoint_url: str | None) -> str:
    """Why a store does not answer, with the remedy."""
    if isinstance(error.__cause__, StoreNotTrustedError):
        return str(error)
    return f"{error}: check the network" + (" and --endpoint-url: http or https, host, port" if endpoint_url else "")


async def reach_place(store: Store, place: Place, *, deadline_s: float) -> bool:
    """As `reach`, for one place of a mount. A tenant may have no object yet, and may list no more than its path."""
    if place.tenant is None:
        return await reach(store, place.options, deadline_s=deadline_s)
    await Retrying(deadline_s=deadline_s, on_failure=None).call("no answer", probe(store, place))
    return True


def probe(store: Store, place: Place) -> Callable[[], Awaitable[object]]:
    """A question that shows whether the store of a place answers."""
    if place.path == place.base:
        return store.probe
    return partial(store.list_page, place.path[len(place.base) :], limit=1)
