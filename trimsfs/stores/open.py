"""Which store a URL or path names, in which layout: opens it, for reads or for writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from trimsfs.errors import ConfigurationError
from trimsfs.options import MountOptions, Place, places
from trimsfs.plugins import load, plugins
from trimsfs.stores.base import Store
from trimsfs.stores.layouts.hf_cache import HasRefs, HfCacheStore
from trimsfs.stores.layouts.versioned import VersionedStore
from trimsfs.stores.local_directory import DirectoryStore
from trimsfs.stores.router import StoreRouter

if TYPE_CHECKING:
    from trimsfs.stores.writer import Writer

_ACCESS_POINT = re.compile(
    r"arn:aws[a-z-]*:s3(?:-outposts)?:[a-z0-9-]*:[0-9]{12}:"
    r"(?:outpost[/:][A-Za-z0-9-]+[/:])?accesspoint[/:][A-Za-z0-9.-]+(?=/|\Z)"
)
"""The ARN of an access point in one region or several, or on Outposts. It may hold slashes."""
ANY_SCHEME = "*"
"""The name of the plugin for URLs whose scheme has none of its own."""
LEAST_REQUESTS = 4
"""Fewest requests to one of several stores, however many they are."""


def open_store(options: MountOptions, *, max_requests: int) -> Store:
    """The store that ``options.store`` names, in its layout, or the several of ``options.stores``.

    *max_requests* reads may be under way at once; each of several has a share. Raises ConfigurationError when a URL
    names no store.
    """
    all_places = places(options)
    if [place.path for place in all_places] != [""]:
        each = max_requests_each(max_requests, len(all_places))
        return routed(all_places, {place.path: _open_place(place, each) for place in all_places})
    share_links = options.signatures == "off"  # else a file signed at one path could be opened at others
    store = _open(options, max_requests, share_links)
    if options.layout == "plain":
        return store
    if isinstance(store, HasRefs):
        return HfCacheStore(store, store.refs, share_links=share_links)
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


def _open(options: MountOptions, max_requests: int, share_links: bool) -> Store:
    url = options.store or ""
    if url.startswith("s3://"):
        bucket, prefix = _bucket(url)
        from trimsfs.stores.s3 import S3Store  # noqa: PLC0415 - boto3 is slow to load, and other stores do not need it

        return S3Store(bucket, prefix, options, max_requests=max_requests)
    directory = directory_of(url)
    if directory is None:
        return _open_plugin(url, options, max_requests)
    if url:
        return DirectoryStore(directory, share_links=share_links)
    raise ConfigurationError("no store: write s3://BUCKET[/PREFIX] or a directory")


def _open_plugin(url: str, options: MountOptions, max_requests: int) -> Store:
    """The store that an extra knows by the scheme of its URL. Raises ConfigurationError."""
    scheme, _, rest = url.partition("://")
    if scheme != scheme.lower():
        raise ConfigurationError(f"store {url}: a scheme is in lower case: write {scheme.lower()}://{rest}")
    by_scheme = plugins("stores")
    place = by_scheme.get(scheme) or by_scheme.get(ANY_SCHEME)
    if place is None:
        raise ConfigurationError(f"store {url}: no store has this scheme: write s3://BUCKET[/PREFIX] or a directory")
    store: Store = load(place)(url, options, max_requests=max_requests)
    return store


def open_writer(options: MountOptions, *, scratch: str, max_requests: int, conditions: bool = True) -> "Writer":
    """A writer of the store that ``options.store`` names; *max_requests* may be under way at once.

    In a directory, files are written below the key *scratch*. Without *conditions*, a bucket is written to without any.
    Raises ConfigurationError when the URL names no store that trimsfs can write to.
    """
    url = options.store or ""
    if url.startswith("s3://"):
        bucket, prefix = _bucket(url)
        from trimsfs.stores.s3.s3_writer import S3Writer  # noqa: PLC0415 - likewise

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


def routed(all_places: Sequence[Place], stores: Mapping[str, Store]) -> StoreRouter:
    """The *stores* of several places, by path. A tenant with credentials has a cache of its own, unless it shares.

    Raises ConfigurationError for a store that the operator has at two places with different credentials.
    """
    identities, whose = dict[str, str](), dict[str, Place]()
    for place in all_places:
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
    return StoreRouter(stores, bases={place.path: place.base for place in all_places}, identities=identities)


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
