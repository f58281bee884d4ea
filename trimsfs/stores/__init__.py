"""Stores: where models come from, behind one protocol; S3, a directory, fsspec, and a retrying wrapper."""

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trimsfs.errors import BucketNotFoundError, ConfigurationError
from trimsfs.options import MountOptions, Place, places
from trimsfs.stores.base import Page, Store
from trimsfs.stores.directory import DirectoryStore
from trimsfs.stores.fsspec import FsspecStore
from trimsfs.stores.retrying import Retrying, RetryingStore
from trimsfs.stores.router import StoreRouter

__all__ = [
    "DirectoryStore",
    "FsspecStore",
    "Page",
    "Retrying",
    "RetryingStore",
    "Store",
    "StoreRouter",
    "after_fork",
    "max_requests_each",
    "open_store",
    "probe",
    "reach",
    "reach_place",
    "routed",
]

log = logging.getLogger(__name__)

LEAST_REQUESTS = 4
"""Fewest requests to one of several stores, however many they are."""


def open_store(options: MountOptions, *, max_requests: int) -> Store:
    """The store that ``options.store`` names, or the several of ``options.stores``, each with a share of the requests.

    *max_requests* reads may be under way at once. Raises ConfigurationError when the URL names no store.
    """
    found = places(options)
    if [place.path for place in found] != [""]:
        each = max_requests_each(max_requests, len(found))
        return routed(found, {place.path: open_store(place.options, max_requests=each) for place in found})
    url = options.store or ""
    share_links = options.signatures == "off"  # else a file signed at one path could be opened at others
    if url.startswith("s3://"):
        # Not parsed as a URL: a prefix may hold any character.
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket):
            raise ConfigurationError(f"store {url!r}: {bucket!r} is not a bucket name: write s3://BUCKET[/PREFIX]")
        from trimsfs.stores.s3 import S3Store  # noqa: PLC0415 - boto3 is slow to load, and other stores do not need it

        return S3Store(bucket, prefix, options, max_requests=max_requests)
    if url.startswith("file://"):
        return DirectoryStore(Path(unquote(urlsplit(url).path)), share_links=share_links)
    if "://" in url:
        return FsspecStore(url, max_requests=max_requests)
    if url:
        return DirectoryStore(Path(url), share_links=share_links)
    raise ConfigurationError("no store: write s3://BUCKET[/PREFIX] or a directory")


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


async def reach_place(store: Store, place: Place, *, deadline_s: float) -> None:
    """As `reach`, for one place of a mount. A tenant may have no object yet, and may list no more than its path."""
    if place.tenant is None:
        await reach(store, place.options, deadline_s=deadline_s)
    else:
        await Retrying(deadline_s=deadline_s, on_failure=None).call("no answer", probe(store, place))


def probe(store: Store, place: Place) -> Callable[[], Awaitable[object]]:
    """A question that shows whether the store of a place answers."""
    if place.path == place.base:
        return store.probe
    return partial(store.list_page, place.path[len(place.base) :], limit=1)
