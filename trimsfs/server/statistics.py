"""What a server tells of itself, its keeper and the processes of its mount, in control files and metrics."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperStatistics:
    """Whether the keeper is there: 1 or 0."""

    connected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """How many servers this mount has had before, and when this one was started, in seconds since the epoch; what this
    one has open, and how many processes the mount has."""

    restarts: int
    started: float
    open_descriptors: int
    descriptor_limit: int
    processes: int


def facts(
    options: MountOptions, environment: Environment, tiers: Tiers, fetching: Fetching, gpu: Gpu
) -> Callable[[], dict[str, object]]:
    """What the control file ``control`` tells about the mount."""
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
        "passthrough": tiers.passthrough.facts(),
        "gpu": gpu.interface.facts(),
        "options": options.model_dump(mode="json", exclude_none=True),
    }


def sources(
    environment: Environment, tiers: Tiers, fetching: Fetching, gpu: Gpu, checks: Checks
) -> dict[str, metrics.Source]:
    """What is counted, by the first word of the metrics' names."""
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
    """Statistics of the keeper."""
    return KeeperStatistics(connected=int(environment.kept()))


def _server_statistics(environment: Environment) -> ServerStatistics:
    """Statistics of this server."""
    return ServerStatistics(
        restarts=environment.restarts,
        started=environment.started,
        open_descriptors=open_descriptors(),
        descriptor_limit=_descriptor_limit(),
        processes=sum(roles(_keeper(environment)).values()),
    )


def _process_facts(environment: Environment) -> dict[str, object]:
    """What the control file ``control`` tells of this server, its keeper and their processes."""
    keeper, problem = _keeper(environment), None
    if keeper is None:
        remedy = f"`mountctl recover {shlex.quote(str(environment.mountpoint))}`"
        problem = f"pid {environment.keeper_pid} has ended, and no other server would follow this one: run {remedy}"
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
