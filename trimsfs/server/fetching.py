"""The part of the assembly that asks stores: for names, bytes and digests."""

from collections.abc import Callable, Iterable

from trimsfs.control.tensor_tables import TensorTables
from trimsfs.fetch.bypass import EarlyHeads
from trimsfs.fetch.equal_chunks import EqualChunkCopier
from trimsfs.fetch.fetcher import Fetcher, Fetchers
from trimsfs.fetch.peers import Peers
from trimsfs.fetch.store_fetcher import StoreFetcher
from trimsfs.fetch.store_requests import StoreSpeed, max_requests
from trimsfs.filesystem.rights import Rights
from trimsfs.integrity.digest_prefetch import DigestPrefetch
from trimsfs.namespace.kept_listings import KeptListings
from trimsfs.namespace.tree import Namespace
from trimsfs.options import MountOptions, places
from trimsfs.origins import ByPath
from trimsfs.server.components import Fetching, Tiers
from trimsfs.server.environment import Environment
from trimsfs.stores.base import Peekable
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.stores.layouts.versioned import VersionedStore
from trimsfs.stores.open import max_requests_each
from trimsfs.stores.retrying import Retrying, RetryingStore, request_histogram
from trimsfs.stores.router import StoreRouter, stores_of
from trimsfs.telemetry.tracer import Tracer
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation


def store_speeds(options: MountOptions, environment: Environment) -> ByPath[StoreSpeed]:
    """The speed of each store, and its limit of requests."""
    stores = [place.path for place in places(options)]
    most = max_requests(options.memory_limit, request_memory=environment.request_memory)
    each = max_requests_each(most, len(stores))
    return ByPath({path: StoreSpeed(max_requests=each) for path in stores}, elsewhere=StoreSpeed(max_requests=each))


def assemble_fetching(
    options: MountOptions,
    environment: Environment,
    tiers: Tiers,
    speed: ByPath[StoreSpeed],
    tracer: Tracer,
    *,
    names: Callable[[Blob], Iterable[Generation]],
    replaced: Callable[[str], None],
    peers: Peers | None,
) -> Fetching:
    """Build the components that ask the stores. Each store has its own retries, breaker and fetcher.

    *names* tells the generations by which programs have a blob open, each with the key that they used. *replaced* hears
    of each directory in which the store has replaced an object. *peers* are the other hosts of a fleet.
    """
    retrying = _retrying(options, environment, speed)
    impatient = VersionedStore(environment.store)
    store = RetryingStore(impatient, retrying)
    origins = environment.store.origins if isinstance(environment.store, StoreRouter) else None
    kept = KeptListings(tiers.disk.listings, origins)
    breakers = retrying.map(lambda each: each.breaker)
    early = None
    alone = options.digests != "wait" and options.signatures == "off" and options.cold_open == "auto"
    # A host that shares chunks fetches what it lacks and no more; a fleet together would keep the store busy.
    alone = alone and not options.share_chunks and peers is None
    if isinstance(environment.store, Peekable) and alone:
        early = EarlyHeads(environment.store, breakers.of(""))
    stores, disk = dict(stores_of(environment.store)), tiers.disk

    def fetcher(path: str, *, streaming: bool) -> Fetcher:
        equal = None
        if options.share_chunks:
            equal = EqualChunkCopier(
                disk.equal_chunks, disk.blobs, disk.space, environment.copier, impatient, path=disk.files.path
            )
        return StoreFetcher(
            environment.copier,
            disk.blobs,
            disk.space,
            disk.damage,
            retrying.of(path),
            speed.of(path),
            memory_limit=options.memory_limit // len(stores),
            chunk_size=environment.chunk_size,
            streaming=streaming,
            models=tracer.models,
            completed=tiers.passthrough.register,
            names=names,
            equal=equal,
            peers=peers,
            store=environment.store if streaming else None,
            early=early,
        )

    fetchers = {path: fetcher(path, streaming=store.streaming) for path, store in stores.items()}
    chunks = fetchers[""] if origins is None else Fetchers(fetchers, elsewhere=fetcher("", streaming=False))
    namespace = Namespace(
        store,
        ttl_s=options.metadata_ttl,
        stale_for_s=options.stale_for,
        impatient=impatient,
        breaker=breakers,
        kept=kept,
        ledger=environment.ledger,
        origins=origins,
        invalidate=environment.invalidate,
        replaced=replaced,
        unlisted=early.expect if early is not None else lambda _: None,
    )
    return Fetching(
        retrying=retrying,
        breakers=breakers,
        kept_listings=kept,
        namespace=namespace,
        fetcher=chunks,
        early_heads=early,
        tables=TensorTables(disk.blobs, chunks),
        digest_prefetch=DigestPrefetch(impatient, store),
        rights=_rights(options, environment, retrying),
    )


def _rights(options: MountOptions, environment: Environment, retrying: ByPath[Retrying]) -> Rights | None:
    """The rights of tenants with credentials of their own; None if there are none."""
    all_places = places(options)
    if not any(place.tenant for place in all_places):
        return None
    return Rights(
        environment.store,
        retrying,
        ByPath({place.path: place for place in all_places}),
        ttl_s=options.metadata_ttl,
        stale_for_s=options.stale_for,
    )


def _retrying(options: MountOptions, environment: Environment, speed: ByPath[StoreSpeed]) -> ByPath[Retrying]:
    """The retries of each store, by its own options. Directories above all stores need no request."""
    seconds = request_histogram()

    def retrying(path: str, own: MountOptions) -> Retrying:
        breaker = CircuitBreaker(deadline_s=own.retry_deadline, ledger=environment.ledger, path=path)
        return Retrying(
            deadline_s=own.retry_deadline,
            on_failure=speed.of(path).request_failed,
            breaker=breaker,
            reached=True,
            request_seconds=seconds,
        )

    above = Retrying(deadline_s=options.retry_deadline, on_failure=None)
    return ByPath({place.path: retrying(place.path, place.options) for place in places(options)}, elsewhere=above)
