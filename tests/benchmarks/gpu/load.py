"""How long a process waits for tensors: the first that asks for a model, those after it, and by other libraries."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks.children import Child, ChildError
from tests.benchmarks.gpu.bench import GpuBench
from tests.benchmarks.gpu.data import Model
from tests.benchmarks.results import TRIMSFS, Key
from tests.benchmarks.scale import size_text
from tests.support.mounts import MountedStore

LOAD = "load"
THERE, MADE = "context there", "context made as well"
CONTEXTS = {THERE: 1, MADE: 0}
TORCH_LOAD = "torch.load, local file"
READY_S = 180
"""For imports, and for contexts of several processes at once."""


@dataclass(frozen=True, slots=True)
class Other:
    """Another library: what the tables name it, the way of `loader`, and the end of its file's name."""

    name: str
    way: str
    suffix: str


OTHERS = (
    Other("torch.load", "torch_load", ".pt"),
    Other("torch.load, mmap=True", "torch_load_mmap", ".pt"),
    Other("safetensors", "safetensors", ".safetensors"),
    Other("fastsafetensors", "fastsafetensors", ".safetensors"),
    Other("runai-model-streamer", "runai", ".safetensors"),
)


def load(bench: GpuBench) -> None:
    """Each size, all of it in the page cache: every way in a process of its own, in turns."""
    for size in bench.sizes(LOAD, bench.scale.loads, files=2):
        model = bench.models.model(size)
        files = [model, pickled] if (pickled := convert(bench, model)) else [model]
        with bench.mounted() as mount:
            for file in files:
                bench.warm(mount, file)
                bench.models.heat(file.name)
            for _ in range(bench.scale.rounds):
                for name, context in CONTEXTS.items():
                    _round(bench, mount, model, size_text(size), name, context)
        bench.models.remove(size)


def convert(bench: GpuBench, model: Model) -> Model | None:
    """The same tensors in a file for ``torch.load``; None without PyTorch, when nothing will read it either.

    Raises ChildError, TooSlowError.
    """
    path = bench.models.path(model.name)
    with loading(bench, "convert", path, model) as child:
        try:
            child.wait_ready(READY_S)
        except ChildError:
            return None
        child.tell()
        child.outcome(10 * bench.scale.timeout_s)
    made = path.with_suffix(".pt")
    return model._replace(name=made.name, nbytes=made.stat().st_size)


def loading(bench: GpuBench, way: str, path: Path, model: Model, *, context: int = 1) -> Child:
    """A process that will load a model."""
    torch = int(not bench.card.emulated)
    return bench.child("loader", way, path, probe=model.probe, context=context, torch=torch)


def check(child: Child, model: Model, timeout_s: float) -> None:
    """See that a process which has loaded a model has the bytes of it. Raises ValueError, ChildError, TooSlowError."""
    child.tell()
    if child.outcome(timeout_s)["checksum"] != model.checksum:
        raise ValueError("other bytes than those of the file")


def _round(bench: GpuBench, mount: MountedStore, model: Model, case: str, name: str, context: int) -> None:
    for label, other, path in _files(bench, mount, model):
        measure = partial(_alone, bench, other.way, path, model, context)
        bench.take([Key(LOAD, name, case, label)], measure)
    last = bench.scale.processes
    places = {f"{TRIMSFS}, 1st process": 0, f"{TRIMSFS}, 2nd process": 1, f"{TRIMSFS}, last of {last}": last - 1}
    keys = [Key(LOAD, name, case, label) for label in places]
    bench.take(keys, partial(_in_turn, bench, mount, model, context, list(places.values())))


def _files(bench: GpuBench, mount: MountedStore, model: Model) -> Iterator[tuple[str, Other, Path]]:
    for other in OTHERS:
        file = str(Path(model.name).with_suffix(other.suffix))
        yield f"{other.name}, local file", other, bench.models.path(file)
        yield f"{other.name}, from the mount", other, mount.path / file


def _alone(bench: GpuBench, way: str, path: Path, model: Model, context: int) -> Sequence[float]:
    with loading(bench, way, path, model, context=context) as child:
        child.wait_ready(READY_S)
        child.tell()
        seconds = child.outcome(bench.scale.timeout_s)["seconds"]
        check(child, model, bench.scale.timeout_s)
    return [seconds]


def _in_turn(
    bench: GpuBench, mount: MountedStore, model: Model, context: int, places: Sequence[int]
) -> Sequence[float]:
    """The seconds of some of several processes that load one after the other, and keep what they have."""
    bench.wait_idle(mount)
    with ExitStack() as stack:
        children = [
            stack.enter_context(loading(bench, "trimsfs", mount.path / model.name, model, context=context))
            for _ in range(bench.scale.processes)
        ]
        for child in children:
            child.wait_ready(READY_S)
        seconds = []
        for child in children:
            child.tell()
            seconds.append(child.outcome(bench.scale.timeout_s)["seconds"])
        for child in children:
            check(child, model, bench.scale.timeout_s)
    return [seconds[place] for place in places]
