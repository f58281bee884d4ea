"""What processes that all have the same model on the card take of it, and of the host's memory."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.benchmarks.children import Child
from tests.benchmarks.gpu.bench import GpuBench
from tests.benchmarks.gpu.data import Model
from tests.benchmarks.gpu.load import READY_S, TORCH_LOAD, check, convert, loading
from tests.benchmarks.machine import available_bytes, own_memory_bytes
from tests.benchmarks.results import TRIMSFS, Key
from tests.benchmarks.scale import size_text

MEMORY = "memory"
MODEL, CONTEXT, SERVER_CONTEXT = (
    "device memory of the model",
    "device memory of a context",
    "device memory of the server's context",
)
PSS, PEAK, AVAILABLE, SERVER = "PSS of the processes", "peak of one process", "less MemAvailable", "server memory"
SETTLED_S, LOOKS = 0.1, 100
"""Contexts of processes that have ended go a moment later."""


def memory(bench: GpuBench) -> None:
    """Processes that load one model, one after the other, and keep it; by ``torch.load``, and from a mount."""
    count = bench.scale.processes
    for size in bench.sizes(MEMORY, [bench.scale.memory], on_device=count, files=2):
        model = bench.models.model(size)
        case = f"{count} processes, {size_text(size)}"
        convert(bench, model)
        path = bench.models.path(model.name).with_suffix(".pt")
        with bench.child("device", "memory") as watch:
            watch.wait_ready()
            for _ in range(bench.scale.memory_rounds):
                names = [MODEL, CONTEXT, PSS, PEAK, AVAILABLE]
                native = partial(_held, bench, watch, "torch_load", path, model)
                bench.take([Key(MEMORY, name, case, TORCH_LOAD) for name in names], native)
                shared = partial(_shared, bench, watch, model)
                bench.take([Key(MEMORY, name, case, TRIMSFS) for name in (*names, SERVER, SERVER_CONTEXT)], shared)
        bench.models.remove(size)


def _shared(bench: GpuBench, watch: Child, model: Model) -> Sequence[float]:
    """As `_held`, then the server's memory, and what its context takes of the card."""
    before = _free(bench, watch)
    with bench.mounted() as mount:
        bench.warm(mount, model)
        context = before - _free(bench, watch)
        facts = mount.control()
        servers = (facts["server_pid"], facts["keeper_pid"])
        held = _held(bench, watch, "trimsfs", mount.path / model.name, model)
        return [*held, own_memory_bytes(servers, mount.cache), context]


def _held(bench: GpuBench, watch: Child, way: str, path: Path, model: Model) -> Sequence[float]:
    """Bytes: of the card for the model, and for each context; of the host, see `memory`."""
    at_first = _free(bench, watch)
    with ExitStack() as stack:
        children = [stack.enter_context(loading(bench, way, path, model)) for _ in range(bench.scale.processes)]
        for child in children:
            child.wait_ready(READY_S)
        pids = [child.pid for child in children]
        ready, pss, available = _free(bench, watch), own_memory_bytes(pids, path), available_bytes()
        peaks = []
        for child in children:
            child.tell()
            peaks.append(child.outcome(bench.scale.timeout_s)["peak"])
        taken = [
            ready - _free(bench, watch),
            (at_first - ready) / len(children),
            own_memory_bytes(pids, path) - pss,
            statistics.median(peaks),
            available - available_bytes(),
        ]
        for child in children:
            check(child, model, bench.scale.timeout_s)
    return taken


def _free(bench: GpuBench, watch: Child) -> float:
    """Bytes of the card that nobody uses, once that does not change any more."""
    before = -1.0
    for _ in range(LOOKS):
        watch.tell()
        free = watch.outcome(bench.scale.timeout_s)["free"]
        if free == before:
            break
        before = free
        time.sleep(SETTLED_S)
    return before
