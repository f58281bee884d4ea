"""How fast a model gets to the card: from memory, beside plain copies of as many bytes, and from the store."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.benchmarks.gpu.bench import GpuBench
from tests.benchmarks.gpu.data import Model
from tests.benchmarks.results import TRIMSFS, Key
from tests.benchmarks.scale import size_text
from tests.support.mounts import MountedStore

FILL, FETCH = "fill", "fetch"
PLAIN, PLAIN_FILE = "pinned copies", "pinned copies of the file"
TO_DISK, TO_CARD = f"{TRIMSFS}, to disk", f"{TRIMSFS}, to the card"
ALLOCATED = "device memory taken"


def fill(bench: GpuBench) -> None:
    """Each size, all of it in the page cache. Contenders take turns."""
    for size in bench.sizes(FILL, bench.scale.fills):
        model = bench.models.model(size)
        with bench.mounted() as mount:
            bench.warm(mount, model)
            bench.models.heat(model.name)
            ways = {
                PLAIN: partial(_plain, bench, model, "copy"),
                PLAIN_FILE: partial(_plain, bench, model, "copy_file"),
                TRIMSFS: partial(_filled, bench, mount, model),
            }
            for _ in range(bench.scale.fill_rounds):
                for contender, measure in ways.items():
                    names = [FILL] if contender == TRIMSFS else [FILL, ALLOCATED]
                    bench.take([Key(FILL, name, size_text(size), contender) for name in names], measure)
        bench.models.remove(size)


def _plain(bench: GpuBench, model: Model, action: str) -> Sequence[float]:
    outcome = bench.ask(action, bench.models.path(model.name))
    bench.note_link()
    return [model.nbytes / outcome["seconds"], outcome["allocate_s"]]


def _filled(bench: GpuBench, mount: MountedStore, model: Model) -> Sequence[float]:
    bench.wait_idle(mount)
    return [model.nbytes / bench.ask("lease", bench.control_file(mount, model))["seconds"]]


def fetch(bench: GpuBench) -> None:
    """Each size from an endpoint that answers at once: to the cache only, and to the card as well."""
    for size in bench.sizes(FETCH, bench.scale.fetches):
        model = bench.models.model(size)
        with bench.mounted() as mount:
            command = mount.path / ".trims" / model.name / "warm-disk"
            ways = {
                TO_DISK: partial(_fetched, bench, mount, model, "command", command),
                TO_CARD: partial(_fetched, bench, mount, model, "lease", bench.control_file(mount, model)),
            }
            for _ in range(bench.scale.rounds):
                for contender, measure in ways.items():
                    bench.take([Key(FETCH, FETCH, size_text(size), contender)], measure)
        bench.models.remove(size)


def _fetched(bench: GpuBench, mount: MountedStore, model: Model, action: str, path: Path) -> Sequence[float]:
    bench.evict(mount, model)
    bench.models.heat(model.name)
    return [model.nbytes / bench.ask(action, path)["seconds"]]
