"""Statistics: a server's facts about itself, its keeper and their processes, for control files and metrics."""

import dataclasses
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from trimsfs import __version__
from trimsfs.control import metrics
from trimsfs.control.extra import Extra
from trimsfs.fuse.kernel_features import kernel_facts
from trimsfs.options import MountOptions, places
from trimsfs.processes import open_descriptors, roles
from trimsfs.server.components import Checks, Fetching
from trimsfs.server.environment import Environment
from trimsfs.server.plugin import Core
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.stores.retrying import StoreStatistics
from trimsfs.telemetry.histogram import Histogram
from trimsfs.telemetry.model_counters import Labelled


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperStatistics:
    """``connected`` is 1 while the keeper runs and answers, else 0."""

    connected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """``restarts`` counts the mount's earlier servers; ``started`` is in seconds since the epoch.

    ``info`` has the version, ``takeover_seconds`` how long its takeover took. The descriptors are this server's, the
    processes the mount's.
    """

    info: Labelled
    restarts: int
    started: float
    takeover_seconds: Histogram
    open_descriptors: int
    descriptor_limit: int
    processes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoresStatistics:
    """Of each of several stores, what `StoreStatistics` counts."""

    requests: Labelled
    failed_attempts: Labelled
    circuit_open: Labelled
    circuit_openings: Labelled


def facts(core: Core, extras: Sequence[Extra]) -> Callable[[], dict[str, object]]:
    """A function that returns the content of the control file ``control``."""
    options, environment, tiers, fetching = core.options, core.environment, core.tiers, core.fetching
    return lambda: {
        "version": __version__,
        "mountpoint": str(environment.mountpoint),
        "store": options.store,
        **_process_facts(environment),
        "cache_dir": str(options.cache_dir),
        "store_problem": _store_problem(fetching),
        "store_refuses": any(breaker.refusal for breaker in fetching.breakers.values()),
        "store_empty": _store_empty(options, fetching),
        "store_known": all(breaker.known for breaker in fetching.breakers.values()),
        **({"stores": _stores(options, fetching)} if fetching.several else {}),
        "cache_problem": tiers.disk.unusable or tiers.disk.budget.too_small(),
        "cache_disk_bytes": tiers.disk.budget.disk_bytes(),
        "log_file": None if options.log_file is None else str(options.log_file),
        "waits": environment.waits(),
        "kernel": kernel_facts(),
        "passthrough": tiers.passthrough.facts(),
        **{name: fact for extra in extras for name, fact in extra.facts().items()},
        "options": options.model_dump(mode="json", exclude_none=True),
    }


def sources(core: Core, extras: Sequence[Extra], checks: Checks) -> dict[str, metrics.Source]:
    """The functions that return statistics, by the first word of their metrics' names."""
    environment, tiers, fetching = core.environment, core.tiers, core.fetching
    by_name: dict[str, metrics.Source] = {
        "disk": tiers.disk.statistics,
        "fetch": fetching.fetcher.statistics,
        "host": tiers.host.statistics,
        "integrity": checks.integrity.statistics,
        "keeper": lambda: KeeperStatistics(connected=int(environment.keeper_problem() is None)),
        "names": fetching.namespace.statistics,
        "server": partial(_server_statistics, environment),
        "store": partial(_store_statistics, fetching),
        **{name: source for extra in extras for name, source in extra.sources.items()},
    }
    if fetching.several:
        by_name["stores"] = partial(_by_store, fetching)
    if checks.signature_policy is not None:
        by_name["signatures"] = checks.signature_policy.statistics
    return by_name


def _store_problem(fetching: Fetching) -> str | None:
    """Why a store does not answer or refuses, with its path if there are several; None if all serve."""
    problems = [(path, _problem_of(breaker)) for path, breaker in fetching.breakers.items()]
    failing = [f"/{path.rstrip('/')}: {why}" if fetching.several else why for path, why in problems if why is not None]
    return "; ".join(failing) or None


def _store_empty(options: MountOptions, fetching: Fetching) -> str | None:
    """The operator's stores under which there is nothing, maybe as they are misspelt; None if there are none."""
    empty = [
        str(place.options.store)
        for place in places(options)
        if place.tenant is None and fetching.namespace.is_empty(place.path)
    ]
    return ", ".join(empty) or None


def _problem_of(breaker: CircuitBreaker) -> str | None:
    """Why one store does not answer, or what it refuses; None if it serves."""
    return breaker.outage[1] if breaker.outage is not None else breaker.refusal


def _stores(options: MountOptions, fetching: Fetching) -> list[dict[str, object]]:
    """Facts about each of several stores, for the control file ``control``."""
    stores = list[dict[str, object]]()
    for place in sorted(places(options), key=attrgetter("path")):
        counted, breaker = fetching.retrying.of(place.path).statistics(), fetching.breakers.of(place.path)
        stores.append(
            {
                "path": place.path.rstrip("/"),
                "store": place.options.store,
                "tenant": place.tenant.path if place.tenant is not None else None,
                "problem": _problem_of(breaker),
                "refuses": breaker.refusal is not None,
                "requests": counted.requests,
                "failed_attempts": counted.failed_attempts,
            }
        )
    return stores


def _store_statistics(fetching: Fetching) -> StoreStatistics:
    """The statistics of all stores together; the circuit counts as open if it is for one of them."""
    counted = [retrying.statistics() for retrying in fetching.retrying.values()]
    return StoreStatistics(
        requests=sum(each.requests for each in counted),
        failed_attempts=sum(each.failed_attempts for each in counted),
        request_seconds=counted[0].request_seconds,
        circuit_open=max(each.circuit_open for each in counted),
        circuit_openings=sum(each.circuit_openings for each in counted),
    )


def _by_store(fetching: Fetching) -> StoresStatistics:
    """The statistics of each of several stores."""
    counted = {path.rstrip("/"): retrying.statistics() for path, retrying in fetching.retrying.items()}

    def by_store(field: str) -> Labelled:
        return Labelled(("store",), {(path,): getattr(each, field) for path, each in counted.items()})

    return StoresStatistics(**{field.name: by_store(field.name) for field in dataclasses.fields(StoresStatistics)})


def _server_statistics(environment: Environment) -> ServerStatistics:
    return ServerStatistics(
        info=Labelled(("version",), {(__version__,): 1}),
        restarts=environment.restarts,
        started=environment.started,
        takeover_seconds=environment.takeover_seconds,
        open_descriptors=open_descriptors(),
        descriptor_limit=_descriptor_limit(),
        processes=sum(roles(_keeper(environment)).values()),
    )


def _process_facts(environment: Environment) -> dict[str, object]:
    """The part of the control file ``control`` about this server, its keeper and their processes."""
    keeper = _keeper(environment)
    return {
        "server_pid": environment.server_pid,
        "keeper_pid": keeper,
        "keeper_problem": environment.keeper_problem(),
        "keeper_stays": environment.launched,
        "started": environment.started,
        "restarts": environment.restarts,
        "processes": roles(keeper),
        "descriptors": {"open": open_descriptors(), "limit": _descriptor_limit()},
    }


def _keeper(environment: Environment) -> int | None:
    return environment.keeper_pid if environment.kept() else None


def _descriptor_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
