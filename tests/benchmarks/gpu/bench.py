"""What every measurement on a card uses: models, the endpoint, mounts, and the table that samples go to."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks.bench import FAILURES
from tests.benchmarks.children import Child, TooSlowError
from tests.benchmarks.contenders import MOUNTING_S
from tests.benchmarks.data import BUCKET
from tests.benchmarks.gpu.card import Card, link
from tests.benchmarks.gpu.data import Model, Models
from tests.benchmarks.gpu.scale import GpuScale
from tests.benchmarks.machine import available_bytes
from tests.benchmarks.results import TRIMSFS, Key, Results
from tests.benchmarks.scale import size_text
from tests.services.fast import FastS3
from tests.support.mounts import MountedStore, mounted, trimsfs, unmount, wait_until

DEVICE_SHARE = 0.8
"""Of a device, for copies: the default of ``gpu_memory``."""
IDLE_S = 60
FIRST, FIRST_COPY = "first", "a server's first copy"
EAGER = "eviction=gpu=eager"
"""A copy is given up with its last lease, so that each round loads anew, from the same file in memory."""


@dataclass(slots=True)
class GpuBench:
    """One run."""

    scale: GpuScale
    work: Path
    card: Card
    models: Models
    server: FastS3
    console: Console
    results: Results = field(default_factory=Results)
    facts: dict[str, str | int | bool] = field(default_factory=dict)

    def take(self, keys: Sequence[Key], measure: Callable[[], Sequence[float]]) -> None:
        """Add one sample to each of some series, unless the first could not be measured before.

        Why something cannot be measured is what the tables show in its place. That trimsfs cannot is a failure of the
        run, which goes on.
        """
        known = self.results.series.get(keys[0])
        if known is not None and known.note:
            return
        self.console.print(f"[dim]{': '.join(keys[0])}[/dim]", highlight=False)
        try:
            samples = measure()
        except (TooSlowError, *FAILURES) as error:
            reason = str(error) if isinstance(error, TooSlowError) else _reason(error)
            for key in keys:
                self.results.note(key, reason)
            if keys[0].contender.startswith(TRIMSFS):
                self.results.failures.append(f"{': '.join(keys[0])}: {reason}")
            return
        for key, sample in zip(keys, samples, strict=True):
            self.results.add(key, sample)

    # Mounts

    @contextmanager
    def mounted(self) -> Iterator[MountedStore]:
        """The bucket over an empty cache, by a server that has used the card once: with its context, pinned memory."""
        first = self.models.model(self.scale.first)
        with ExitStack() as stack:
            scratch = tempfile.TemporaryDirectory(prefix="mount-", dir=self.work, ignore_cleanup_errors=True)
            directory = Path(stack.enter_context(scratch))
            options = (EAGER, f"gpu_headroom={self.scale.spare // 2}")
            environment = self.server.environment() | dict(self.card.environment)
            try:
                mount = stack.enter_context(mounted(f"s3://{BUCKET}", directory, *options, environment=environment))
            except (KeyboardInterrupt, SystemExit):
                # The command that mounts ends with us. What it has started does not, and may be about to mount.
                time.sleep(MOUNTING_S)
                unmount(directory / "models")
                raise
            outcome = self.ask("lease", self.control_file(mount, first))
            self.results.add(Key(FIRST, FIRST_COPY, size_text(self.scale.first), TRIMSFS), outcome["seconds"])
            self.wait_idle(mount)
            yield mount

    def control_file(self, mount: MountedStore, model: Model) -> Path:
        """What is opened for a copy of a model."""
        return mount.path / ".trims" / model.name / "gpu" / self.card.uuid

    def warm(self, mount: MountedStore, model: Model) -> None:
        """Have all of a model on disk and in memory, and nowhere else."""
        done = trimsfs("warm", "--quiet", mount.path / model.name, timeout_s=10 * self.scale.timeout_s)
        if done.returncode:
            raise OSError(done.stderr.strip())
        here = mount.info(model.name)["residency"]["disk"]
        if here != model.nbytes:
            raise ValueError(f"{model.name}: {here} of {model.nbytes} bytes are here")

    def evict(self, mount: MountedStore, model: Model) -> None:
        """Have nothing of a model on this host."""
        self.wait_idle(mount)
        done = trimsfs("evict", mount.path / model.name)
        if done.returncode:
            raise OSError(done.stderr.strip())

    def wait_idle(self, mount: MountedStore) -> None:
        """Return once no copy is on the card."""

        def idle() -> bool:
            devices = json.loads((mount.path / ".trims/gpu").read_text())["devices"]
            return all(device["used_bytes"] == 0 for device in devices)

        wait_until(idle, IDLE_S)

    # Processes

    def child(self, module: str, *arguments: str | Path, **options: Any) -> Child:
        """A process that sees the card."""
        return Child(f"gpu.{module}", *arguments, environment=self.card.environment, **options)

    def ask(self, action: str, path: Path) -> dict[str, Any]:
        """What one action of `device` tells."""
        return self.child("device", action, path).run(self.scale.timeout_s)

    def note_link(self) -> None:
        """The link to the card is in use, or was a moment ago: cards let it fall asleep."""
        self.facts["pcie_in_use"] = link(self.card.pci, "current")

    # Room

    def lacks(self, size: int, *, on_device: int = 1, files: int) -> str | None:
        """Why a model of *size* bytes cannot be measured here, so often on the device, and of so many files.

        A file is an object and its copy in the cache.
        """
        most = min(int(self.card.total * DEVICE_SHARE), self.card.free) - self.scale.spare
        if size > most or size * on_device > self.card.free - self.scale.spare:
            return f"{size_text(self.card.free)} are free on the card"
        if 2 * files * size > available_bytes() - self.scale.spare:
            return f"{size_text(available_bytes())} of memory are free"
        free = shutil.disk_usage(self.work).free
        if 2 * files * size > free - 2 * self.scale.spare:
            return f"{size_text(free)} of disk are free"
        return None

    def sizes(self, group: str, wanted: Sequence[int], *, on_device: int = 1, files: int = 1) -> Iterator[int]:
        """Those sizes for which there is room; of the others it is said why they were left out. See `lacks`."""
        for size in wanted:
            if reason := self.lacks(size, on_device=on_device, files=files):
                self.results.skipped.append(f"{group}, {size_text(size)}: {reason}")
            else:
                yield size


def _reason(error: Exception) -> str:
    """The last line of an error, without the name of a class of ours, for a cell of a table."""
    text = (str(error).splitlines() or [""])[-1].strip()
    return text.replace("|", "/") or type(error).__name__
