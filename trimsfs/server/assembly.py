"""Assembly: builds a server's components from the mount's options and the server's environment.

Tests build their servers here, too, each in its own environment.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.control import metrics
from trimsfs.control.actions import Actions
from trimsfs.control.authorisation import Authorisation
from trimsfs.control.commands import Commands
from trimsfs.control.control_files import Control
from trimsfs.control.extra import Extra, Service
from trimsfs.control.reports import Reports
from trimsfs.control.xattrs import Xattrs
from trimsfs.errors import TrimsError
from trimsfs.eviction_policies import eager, never, others_first, policy_named
from trimsfs.fetch.store_requests import StoreSpeed
from trimsfs.filesystem.filesystem import Filesystem
from trimsfs.filesystem.trust import Trust
from trimsfs.integrity.integrity import Integrity
from trimsfs.integrity.signature_policy import SignaturePolicy, signed_first
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.cold_open import ColdOpener
from trimsfs.opening.opener import Opener
from trimsfs.opening.passthrough import Passthrough
from trimsfs.opening.reopens import Reopens
from trimsfs.options import MountOptions, places
from trimsfs.origins import ByPath
from trimsfs.prefetch.prefetcher import Prefetcher
from trimsfs.server.components import Checks, Components, Fetching, Tiers
from trimsfs.server.environment import Environment
from trimsfs.server.fetching import assemble_fetching, store_speeds
from trimsfs.server.late_binding import LateBound, LateCalls
from trimsfs.server.plugin import Core, ServerPlugin
from trimsfs.server.statistics import facts, sources
from trimsfs.stores.digests import Digest
from trimsfs.stores.reach import probe
from trimsfs.stores.retrying import Retrying
from trimsfs.stores.router import StoreRouter, stores_of
from trimsfs.telemetry.tracer import Tracer
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.deduplication import Deduplication
from trimsfs.tiers.disk.budget import DiskLimits
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.host.memory_tier import HostTier
from trimsfs.tiers.quotas import Quotas
from trimsfs.types import Generation


class Calls(LateCalls):
    """Calls from components to those that are built after them."""

    def __init__(self) -> None:
        super().__init__()
        self.blob_removed = LateBound[[Blob], None](self, "blob_removed")
        self.blob_suspected = LateBound[[Blob, TrimsError], None](self, "blob_suspected")
        self.approve = LateBound[[Blob], Awaitable[bool]](self, "approve")
        self.registered = LateBound[[Blob], None](self, "registered")
        self.ask_digest = LateBound[..., Awaitable[Digest | None]](self, "ask_digest")
        self.open_names = LateBound[[Blob], Iterable[Generation]](self, "open_names")
        self.replaced = LateBound[[str], None](self, "replaced")
        self.render_metrics = LateBound[[], Iterator[bytes]](self, "render_metrics")


def assemble(options: MountOptions, environment: Environment, plugins: Sequence[ServerPlugin]) -> Components:
    """Build the components of a mount's server. *options* are resolved. Raises CacheError and TakeoverError."""
    calls = Calls()
    speed = store_speeds(options, environment)
    tiers = _tiers(options, environment, calls, speed)
    tracer = Tracer(share=options.trace_opens)
    asked = (plugin.peers(options, environment, tiers, speed) for plugin in plugins)
    peers = next((each for each in asked if each is not None), None)
    fetching = assemble_fetching(
        options, environment, tiers, speed, tracer, names=calls.open_names, replaced=calls.replaced, peers=peers
    )
    core = Core(options=options, environment=environment, tiers=tiers, fetching=fetching)
    extras = [plugin.build(core) for plugin in plugins]
    checks = _checks(core, calls, extras)
    disk = tiers.disk
    deduplication = Deduplication(disk.directory, disk.blobs, disk.files, disk.index, chunk_size=environment.chunk_size)
    commands = _commands(core, extras, checks)
    control = _control(core, calls, extras, deduplication, commands, tracer)
    prefetcher = Prefetcher(
        fetching.namespace,
        disk.blobs,
        disk.space,
        disk.loads,
        fetching.fetcher,
        tiers.passthrough,
        fetching.breakers,
        # A tier that evicts idle files at once would drop prefetched ones.
        mode="off" if policy_named(options.eviction.disk) is eager else options.prefetch,
        chunk_size=environment.chunk_size,
    )

    def removed(blob: Blob) -> None:
        tiers.passthrough.unregister(blob)
        prefetcher.removed(blob)

    calls.blob_removed.bind(removed)
    reopens = Reopens(environment.ledger)
    filesystem = Filesystem(
        fetching.namespace,
        disk.blobs,
        disk.residencies,
        disk.space,
        control,
        prefetcher,
        Opener(fetching.fetcher, tiers.passthrough, checks.cold_opener, reopens),
        Trust(
            disk.space,
            fetching.fetcher,
            tiers.passthrough,
            compared=options.digests == "wait",
            signature_policy=checks.signature_policy,
            rights=fetching.rights,
            shows_content=control.shows_content,
        ),
        tracer,
        ledger=environment.ledger,
        mounted_ns=environment.mounted_ns,
        prune=environment.prune,
        drop_pages=environment.drop_pages,
    )
    calls.open_names.bind(filesystem.handles.names)
    calls.registered.bind(filesystem.files.registered)
    calls.replaced.bind(filesystem.names.tell_replaced)
    above: dict[str, metrics.Source] = {
        "files": filesystem.statistics,
        "model": filesystem.model_statistics,
        "prefetch": prefetcher.statistics,
        "sharing": deduplication.statistics,
    }
    calls.render_metrics.bind(metrics.renderer(sources(core, extras, checks) | above))
    maintenance: list[Service] = [disk.run, tiers.host.run, checks.integrity.run]
    if options.share_chunks:
        maintenance.append(deduplication.run)
    calls.check()
    return Components(
        disk=disk,
        host=tiers.host,
        passthrough=tiers.passthrough,
        breakers=fetching.breakers,
        fetcher=fetching.fetcher,
        namespace=fetching.namespace,
        prefetcher=prefetcher,
        extras=tuple(extras),
        integrity=checks.integrity,
        commands=commands,
        control=control,
        filesystem=filesystem,
        services=(
            tiers.passthrough.run,
            fetching.fetcher.run,
            fetching.kept_listings.run,
            *_probes(core),
            fetching.digest_prefetch.run,
            *(() if fetching.early_heads is None else (fetching.early_heads.run,)),
            prefetcher.run,
            *(run for extra in extras for run in extra.services),
        ),
        maintenance=tuple(maintenance),
    )


def _probes(core: Core) -> list[Service]:
    """The probes of the stores, each while its own store does not answer."""
    stores, breakers = dict(stores_of(core.environment.store)), core.fetching.breakers
    return [partial(breakers.of(place.path).run, probe(stores[place.path], place)) for place in places(core.options)]


def _tiers(options: MountOptions, environment: Environment, calls: Calls, speed: ByPath[StoreSpeed]) -> Tiers:
    assert options.cache_dir is not None
    store, policy = environment.store, policy_named(options.eviction.disk)
    if options.fleet is not None and policy not in {never, eager}:
        policy = others_first(policy)
    disk = DiskTier(
        options.cache_dir,
        store=store.origins if isinstance(store, StoreRouter) else store.identity,
        limits=DiskLimits(
            budget=options.cache_size,
            min_free=options.min_free,
            quotas=Quotas({f"{tenant.path}/": tenant.cache_size for tenant in options.tenants}),
            policy=policy,
        ),
        load_cost=lambda key, size: speed.of(key).load_cost(size),
        compares=options.digests != "off",
        removed=calls.blob_removed,
        suspected=calls.blob_suspected,
        lock=environment.lock,
        chunk_size=environment.chunk_size,
    )
    retrying = Retrying(deadline_s=options.retry_deadline, on_failure=None)

    async def populate(descriptor: int, start: int, stop: int) -> None:
        load = partial(environment.copier.populate, descriptor, start, stop)
        await retrying.call_locally("loading into memory", load)  # again, if the fetch process dies

    host = HostTier(
        populate,
        budget=options.host_size,
        policy=policy_named(options.eviction.host),
        quotas=Quotas({f"{tenant.path}/": tenant.host_size for tenant in options.tenants}),
    )
    passthrough = Passthrough(
        disk.blobs,
        disk.damage,
        disk.journal,
        host,
        environment.ledger,
        approve=calls.approve,
        suspected=calls.blob_suspected,
        registered=calls.registered,
        compared=options.digests == "wait",
    )
    return Tiers(disk=disk, host=host, passthrough=passthrough)


def _checks(core: Core, calls: Calls, extras: Sequence[Extra]) -> Checks:
    options, environment, tiers, fetching = core.options, core.environment, core.tiers, core.fetching
    disk, prefetch = tiers.disk, fetching.digest_prefetch
    signed = environment.read_manifest is not None
    integrity = Integrity(
        disk.blobs,
        disk.damage,
        disk.journal,
        disk.residencies,
        fetching.fetcher,
        environment.copier,
        fetching.retrying.values()[0],
        tiers.passthrough,
        digests=options.digests,
        scrub_interval_s=options.scrub_interval,
        scrub_rate=options.scrub_rate,
        pace=environment.pace,
        ask_digest=calls.ask_digest,
        repaired=_repaired(core, extras),
    )
    calls.approve.bind(integrity.approve)
    calls.blob_suspected.bind(integrity.quarantine.suspect)
    cold_opener = ColdOpener(
        fetching.fetcher,
        tiers.passthrough,
        mode="wait" if options.digests == "wait" else options.cold_open,
        compared=options.digests == "wait",
        # Where files may be signed, the signed digest takes precedence: no other is prefetched.
        fetching=(lambda _: None) if signed else prefetch.expect,
    )
    policy = None
    if environment.read_manifest is not None:
        policy = SignaturePolicy(
            fetching.namespace,
            disk.blobs,
            fetching.fetcher,
            environment.read_manifest,
            required=options.signatures == "require",
            fetch=cold_opener.fetch,
            compare=integrity.comparer.compare,
            compare_later=integrity.compare_later,
        )
    calls.ask_digest.bind(prefetch.digest if policy is None else signed_first(policy.expected, prefetch.digest))
    return Checks(integrity=integrity, cold_opener=cold_opener, signature_policy=policy)


def _forget_pages(core: Core) -> Callable[[Generation], Awaitable[None]]:
    async def forget_pages(generation: Generation) -> None:
        """Drop the pages that the kernel keeps of a file from reads in cached mode."""
        for number in core.fetching.namespace.inodes.numbers(generation):
            await in_thread(core.environment.forget_pages, number, abandon_on_cancel=True)

    return forget_pages


def _repaired(core: Core, extras: Sequence[Extra]) -> Callable[[Generation], Awaitable[None]]:
    forget_pages = _forget_pages(core)

    async def repaired(generation: Generation) -> None:
        """Drop the kernel's pages of a repaired file; extras check what they have of it."""
        await forget_pages(generation)
        for extra in extras:
            await extra.repaired(generation)

    return repaired


def _commands(core: Core, extras: Sequence[Extra], checks: Checks) -> Commands:
    tiers, fetching, disk = core.tiers, core.fetching, core.tiers.disk
    actions = Actions(
        disk.blobs,
        disk.residencies,
        tiers.host,
        fetching.fetcher,
        tiers.passthrough,
        extras,
        checks.integrity,
        checks.signature_policy,
        fetching.breakers,
        _forget_pages(core),
        cache_size=core.options.cache_size,
    )
    return Commands(
        fetching.namespace, disk.blobs, disk.residencies, actions, fetching.breakers, core.environment.ledger, extras
    )


def _control(
    core: Core,
    calls: Calls,
    extras: Sequence[Extra],
    deduplication: Deduplication,
    commands: Commands,
    tracer: Tracer,
) -> Control:
    tiers, fetching = core.tiers, core.fetching
    authorisation = Authorisation(core.options)
    disk = tiers.disk
    reports = Reports(
        disk.blobs,
        disk.residencies,
        tiers.passthrough,
        deduplication,
        extras,
        authorisation,
        commands.jobs,
        metrics=calls.render_metrics,
        facts=facts(core, extras),
        links=fetching.namespace.links,
        entries=fetching.namespace.entries,
        traces=tracer.traces,
        **({} if fetching.rights is None else {"may_tell": fetching.rights.may_tell}),
    )
    problem = partial(_problem, tiers, fetching)
    return Control(
        Xattrs(fetching.namespace, disk.blobs, disk.residencies, fetching.tables, extras, reports, problem=problem),
        fetching.tables,
        commands,
        extras,
        reports,
        authorisation,
        tells_common=core.options.share_chunks,
        refresh=partial(_refresh, fetching.namespace, core.environment.expire),
    )


async def _refresh(namespace: Namespace, expire: Callable[[Iterable[tuple[int, bytes]]], None], path: str) -> None:
    """Make the next lookup of a path, or of a name below it, ask the store; while that does not answer, what is known
    stays. *expire* makes the kernel look names up."""
    namespace.mark_outdated(path.removesuffix("/"))
    namespace.expire(path)
    await in_thread(expire, namespace.inodes.known_names_below(path), abandon_on_cancel=True)


def _problem(tiers: Tiers, fetching: Fetching, generation: Generation) -> str | None:
    """Why no fetch of a generation starts now or would be refused, or its copy must not be read; else None."""
    token = tiers.disk.blobs.token(generation)
    blob = tiers.disk.blobs.known(token)
    if blob is not None and blob.health.quarantine is not None:
        return str(blob.health.quarantine)
    retrying = fetching.retrying.of(generation.key)
    return retrying.problem(token) or retrying.breaker.refusal
