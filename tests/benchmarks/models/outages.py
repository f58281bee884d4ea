"""Loads while the store does not answer: of models that are here, in this server's life and after it, and of others."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import ChildError
from tests.benchmarks.data import BUCKET
from tests.benchmarks.models.cases import Case, chosen, written
from tests.benchmarks.models.loads import Selection
from tests.services import S3Server
from tests.services.faulty import FaultyS3, Plan, faulty
from tests.services.switch import Switch, switched
from tests.support.mounts import MountedStore, mounted, wait_until

GROUP = "outages"
FIRST, WARM = "the first load", "loads after it"
RESTARTED, REMOUNTED, REBOOTED = "after a restart of the server", "after a new mount", "after a reboot"
COLD = "not here, until the program ends with its error"
ANSWERS, REFUSES, HANGS, GONE = "answers", "503", "hangs", "gone"
STORES = (ANSWERS, REFUSES, HANGS, GONE)
METADATA_TTL_S = 2
"""Short, so that names have expired soon after the store went away, as they would have some time into an outage."""
AGAIN_S = 30


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A store that can be taken away."""

    server: S3Server
    faults: FaultyS3
    switch: Switch

    @contextmanager
    def is_such(self, store: str) -> Iterator[None]:
        """It answers, or it does not in one of three ways."""
        acts: dict[str, Callable[[], None]] = {
            ANSWERS: lambda: None,
            REFUSES: lambda: self.faults.inject(Plan(faults=["slow down"])),
            HANGS: self.switch.hold,
            GONE: self.switch.off,
        }
        acts[store]()
        try:
            yield
        finally:
            self.faults.heal()
            self.switch.let_go()
            if store == GONE:
                self.switch.on()


def outages(bench: Bench, selection: Selection) -> None:
    """Each program that loads a model, with each kind of outage, in turns."""
    with faulty(bench.plain) as faults, switched(faults) as (server, switch):
        endpoint = Endpoint(server, faults, switch)
        for case in chosen(bench, selection.programs):
            for store in STORES:
                names = [FIRST, *[WARM] * bench.scale.warm_repetitions, RESTARTED, REMOUNTED, REBOOTED]
                bench.take(GROUP, case.name, store, names, partial(_loads, bench, endpoint, case, store))
            for store in STORES[1:]:
                bench.take(GROUP, case.name, store, [COLD], partial(_error, bench, endpoint, case, store))


def _loads(bench: Bench, endpoint: Endpoint, case: Case, store: str) -> list[float]:
    written(bench, case.directory)
    with bench.directory() as directory, ExitStack() as outage:
        with _mounted(endpoint, directory) as mount:
            for _ in range(2):  # what is here is compared with the store's digest, too
                _load(bench, case, mount)
            wait_until(lambda: mount.metrics()["trimsfs_integrity_to_compare"] == 0, AGAIN_S)
            outage.enter_context(endpoint.is_such(store))
            time.sleep(METADATA_TTL_S)
            taken = [_load(bench, case, mount) for _ in range(1 + bench.scale.warm_repetitions)]
            _kill(mount)
            taken.append(_load(bench, case, mount))
        with _mounted(endpoint, directory) as mount:
            taken.append(_load(bench, case, mount))
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        with _mounted(endpoint, directory) as mount:
            taken.append(_load(bench, case, mount))
    return taken


def _error(bench: Bench, endpoint: Endpoint, case: Case, store: str) -> list[float]:
    """Seconds until a program ends whose model is listed and not here. Raises ValueError if it does not fail."""
    with bench.directory() as directory, _mounted(endpoint, directory, "--prefetch", "off") as mount:
        os.listdir(mount.path / case.directory)
        with endpoint.is_such(store), case.child() as child:
            child.wait_ready()
            began = time.perf_counter()
            child.tell(mount.path / case.directory)
            try:
                child.outcome(bench.scale.model_timeout_s)
            except ChildError as error:
                bench.console.print(f"[dim]{case.name}, {store}: {error}[/dim]", highlight=False)
                return [time.perf_counter() - began]
    raise ValueError(f"{case.name} was loaded from a store that does not answer")


@contextmanager
def _mounted(endpoint: Endpoint, directory: Path, *more: str) -> Iterator[MountedStore]:
    options = ("--metadata-ttl", str(METADATA_TTL_S), *more)
    with mounted(f"s3://{BUCKET}", directory, *options, environment=endpoint.server.environment()) as mount:
        yield mount


def _load(bench: Bench, case: Case, mount: MountedStore) -> float:
    """Seconds of a load and the first inference, in a process of its own."""
    with case.child() as child:
        child.wait_ready()
        child.tell(mount.path / case.directory)
        outcome = child.outcome(bench.scale.model_timeout_s)
    load_s, infer_s = outcome["load_s"], outcome.get("infer_s", 0.0)
    return float(load_s + infer_s)


def _kill(mount: MountedStore) -> None:
    """Kill the server, and wait for the next one."""
    pid = mount.control()["server_pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: mount.control()["server_pid"] != pid, AGAIN_S, tolerate=OSError)
