"""Statistics: a server's facts about itself, its keeper and their processes, for control files and metrics."""

import os
import resource
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trimsfs import __version__
from trimsfs.control import metrics
from trimsfs.options import MountOptions
from trimsfs.processes import open_descriptors, roles
from trimsfs.server.components import Checks, Fetching, Gpu, Tiers
from trimsfs.server.environment import Environment
from trimsfs.telemetry.histogram import Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperStatistics:
    """``connected`` is 1 while the keeper runs, else 0."""

    connected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """``restarts`` counts the mount's earlier servers; ``started`` is in seconds since the epoch.

    ``takeover_seconds`` is how long its takeover took. The descriptors are this server's, the processes the mount's.
    """

    restarts: int
    started: float
    takeover_seconds: Histogram
    open_descriptors: int
    descriptor_limit: int
    processes: int


def facts(
    options: MountOptions, environment: Environment, tiers: Tiers, fetching: Fetching, gpu: Gpu
) -> Callable[[], dict[str, object]]:
    """A function that returns the content of the control file ``control``."""
    breaker = fetching.retrying.breaker
    return lambda: {
        "version": __version__,
        "mountpoint": str(environment.mountpoint),
        "store": options.store,
        **_process_facts(environment),
        "cache_dir": str(options.cache_dir),
        "store_problem": breaker.outage[1] if breaker.outage is not None else None,
        "cache_problem": tiers.disk.unusable,
        "log_file": str(options.log_file),
        "waits": environment.waits(),
        "passthrough": tiers.passthrough.facts(),
        "gpu": gpu.interface.facts(),
        "options": options.model_dump(mode="json", exclude_none=True),
    }


def sources(
    environment: Environment, tiers: Tiers, fetching: Fetching, gpu: Gpu, checks: Checks
) -> dict[str, metrics.Source]:
    """The functions that return statistics, by the first word of their metrics' names."""
    found: dict[str, metrics.Source] = {
        "disk": tiers.disk.statistics,
        "fetch": fetching.fetcher.statistics,
        "gpu": gpu.copies.statistics,
        "host": tiers.host.statistics,
        "integrity": checks.integrity.statistics,
        "keeper": partial(_keeper_statistics, environment),
        "names": fetching.namespace.statistics,
        "server": partial(_server_statistics, environment),
        "store": fetching.retrying.statistics,
    }
    if checks.signature_policy is not None:
        found["signatures"] = checks.signature_policy.statistics
    return found


def _keeper_statistics(environment: Environment) -> KeeperStatistics:
    return KeeperStatistics(connected=int(environment.kept()))


def _server_statistics(environment: Environment) -> ServerStatistics:
    return ServerStatistics(
        restarts=environment.restarts,
        started=environment.started,
        takeover_seconds=environment.takeover_seconds,
        open_descriptors=open_descriptors(),
        descriptor_limit=_descriptor_limit(),
        processes=sum(roles(_keeper(environment)).values()),
    )


def _process_facts(environment: Environment) -> dict[str, object]:
    """The part of the control file ``control`` about this server, its keeper and their processes."""
    keeper, problem = _keeper(environment), None
    if keeper is None:
        remedy = f"`mountctl recover {shlex.quote(str(environment.mountpoint))}`"
        problem = f"pid {environment.keeper_pid} has ended: no server takes over if this one ends: run {remedy}"
    return {
        "server_pid": os.getpid(),
        "keeper_pid": keeper,
        "keeper_problem": problem,
        "started": environment.started,
        "restarts": environment.restarts,
        "processes": roles(keeper),
        "descriptors": {"open": open_descriptors(), "limit": _descriptor_limit()},
    }


def _keeper(environment: Environment) -> int | None:
    return environment.keeper_pid if environment.kept() else None


def _descriptor_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
