"""What is measured of hosts that are in no fleet and share a cache: all of them at once, in turns with the fleet."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tests.benchmarks.fleet.cases import Case, References, Result
from tests.benchmarks.fleet.setting import Round, Setting
from tests.fleet.stores import BUCKET
from tests.services.caching_proxy import start_caching_proxy
from tests.services.seaweed_cluster import start_seaweed_cluster

TURNS = 3
PATIENCE_S = 60
"""Of requests to gateways of SeaweedFS: when many ask at once, first bytes come after more than 5 s."""


def behind_nginx(to: References) -> Iterator[Result]:
    """One nginx on a host of its own keeps what the hosts ask for."""
    yield from _in_turns("behind nginx", to, _by_nginx)


def behind_seaweed(to: References) -> Iterator[Result]:
    """A SeaweedFS cluster that has the store's bucket mounted: a gateway and a volume server on each host, the filer on
    another. It fetches the object first, which counts."""
    yield from _in_turns("behind SeaweedFS", to, _by_seaweed)


CASES: dict[str, Case] = {"nginx": behind_nginx, "seaweed": behind_seaweed}


def _by_nginx(setting: Setting) -> Round:
    log = setting.logs / "nginx.log"
    with (
        start_caching_proxy(setting.store.server.endpoint_url, setting.cache, log_file=log) as url,
        setting.everyone("--endpoint-url", url, "--anonymous", alone=True) as fleet,
    ):
        return setting.read(fleet.members)


def _by_seaweed(setting: Setting) -> Round:
    with start_seaweed_cluster(setting.cache, setting.hosts) as cluster:
        cluster.mount(setting.store.server, BUCKET)
        before, begun = setting.store.sent_bytes(), time.monotonic()
        cluster.fill(BUCKET, setting.timeout_s)
        filled_s, filled = time.monotonic() - begun, setting.store.sent_bytes() - before
        patient = setting.logs / "patient.toml"
        patient.write_text(f"stall_timeout = {PATIENCE_S}\nretry_deadline = {2 * PATIENCE_S}\n")
        options = ("--endpoint-url", cluster.endpoint_url, "--config", str(patient))
        # Its ETags look like digests and are none: else each host would fetch the object again to find out.
        with setting.everyone(*options, "--digests", "off", alone=True) as fleet:
            read = setting.read(fleet.members)
    return replace(
        read,
        seconds=filled_s + read.seconds,
        first_s=filled_s + read.first_s,
        store_bytes=filled + read.store_bytes,
        ahead_s=filled_s,
    )


def _in_turns(case: str, to: References, behind: Callable[[Setting], Round]) -> Iterator[Result]:
    fleets, caches = list[Round](), list[Round]()
    for _ in range(TURNS):
        with to.setting.everyone() as fleet:
            fleets.append(to.setting.read(fleet.members))
        caches.append(behind(to.setting))
    yield from _medians(case, "the fleet", to, fleets)
    yield from _medians(case, "the cache", to, caches)


def _medians(case: str, who: str, to: References, rounds: Sequence[Round]) -> Iterator[Result]:
    seconds = [each.seconds for each in rounds]
    yield Result(case, f"{who}: time, in seconds", statistics.median(seconds))
    yield Result(case, f"{who}: time / one plain GET", statistics.median(seconds) / to.link_s)
    yield Result(case, f"{who}: the same, least", min(seconds) / to.link_s)
    yield Result(case, f"{who}: the same, most", max(seconds) / to.link_s)
    if any(each.ahead_s for each in rounds):
        yield Result(
            case, f"{who}: of it, before hosts ask, in seconds", statistics.median(each.ahead_s for each in rounds)
        )
    yield Result(case, f"{who}: first bytes, in seconds", statistics.median(each.first_s for each in rounds))
    store_bytes = max(each.store_bytes for each in rounds)
    yield Result(case, f"{who}: bytes of the store / object, most", store_bytes / to.setting.size)
