"""What `trimsfs top` learns of a mount at one moment, and the rates that follow from two of these."""

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimsfs.cli.control_client import check_answers, read_json, read_text
from trimsfs.cli.watch.jobs import jobs_of
from trimsfs.control.metrics import parse
from trimsfs.errors import TrimsError
from trimsfs.mountinfo import Mount
from trimsfs.processes import container_of, holders, process_of, title_of

RATES = 20
"""How many of the last rates are kept."""
PAUSES = 4
"""`trimsfs top` leaves a mount alone for at least this many times as long as its last answer took, times the mounts. To
look which files 100,000 descriptors are of takes a core for a second."""


@dataclass(slots=True)
class Model:
    """What is here of a directory at the top of a mount, or of a file there.

    Sizes are in bytes, ``size`` that of the files of which anything is here. ``open`` counts open handles, ``uses`` all
    opens ever; ``users`` has the name of each process that has a file open or mapped.
    """

    files: int = 0
    size: int = 0
    disk: int = 0
    host: int = 0
    gpu: int = 0
    open: int = 0
    uses: int = 0
    pinned: int = 0
    users: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wait:
    """A process that waits for a path of a mount, and for how many seconds by now."""

    process: str
    path: Path
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What a mount tells at the time ``taken``, of the monotonic clock, in seconds."""

    taken: float
    facts: Mapping[str, Any]
    metrics: Mapping[str, float]
    models: Mapping[str, Model]
    jobs: Sequence[Mapping[str, Any]]
    waits: Sequence[Wait]

    def number(self, name: str) -> int:
        """A metric without its prefix; 0 if the server does not have it."""
        return int(self.metrics.get(f"trimsfs_{name}", 0))


def take_sample(mount: Mount) -> Sample:
    """Ask a mount. Raises TrimsError."""
    check_answers(mount.mountpoint)
    control = mount.mountpoint / ".trims"
    facts = read_json(control / "control")
    waits = [
        Wait(_name(process_of(wait["thread"])), mount.mountpoint / wait["path"], wait["seconds"])
        for wait in facts.get("waits", ())  # only for those who may command
    ]
    return Sample(
        taken=time.monotonic(),
        facts=facts,
        metrics=parse(read_text(control / "metrics")),
        models=_models(mount, read_json(control / "models")["models"]),
        jobs=[job for job in jobs_of(mount) if job["state"] in {"running", "waiting"}],
        waits=waits,
    )


def _models(mount: Mount, files: Sequence[Mapping[str, Any]]) -> dict[str, Model]:
    """The models that files of a mount belong to, by their paths."""
    holding = holders(mount.device) if any(file["open"] for file in files) else {}
    names = {pid: _name(pid) for pids in holding.values() for pid in pids}
    models: dict[str, Model] = {}
    for file in files:
        model = models.setdefault(str(mount.mountpoint / file["path"].partition("/")[0]), Model())
        model.files += 1
        model.size += file["size"]
        model.disk += file["residency"]["disk"]
        model.host += file["residency"]["host"] or 0
        model.gpu += sum(file["residency"]["gpu"].values())
        model.open += file["open"]
        model.uses += file["uses"]
        model.pinned += file["pinned"]
        if file["open"] and names:
            with suppress(OSError):  # deleted in the store
                inode = os.stat(mount.mountpoint / file["path"]).st_ino
                model.users.update((pid, names[pid]) for pid in holding.get(inode, ()))
    return models


def _name(pid: int) -> str:
    """A process by its program, its number and its container."""
    container = container_of(pid)
    return f"{title_of(pid)} {pid}{f' in {container}' if container else ''}"


class History:
    """What a mount has answered so far: the last sample, or why there is none, and the last rates in bytes a second.
    The rates are those of all that came from the store, and of each model's growth on disk. `trimsfs top` asks the
    mount again at the time ``due``."""

    def __init__(self, mount: Mount, interval_s: float) -> None:
        self.mount = mount
        self.sample: Sample | None = None
        self.problem: TrimsError | None = None
        self.asked = self.due = 0.0
        self.rates: deque[float] = deque(maxlen=RATES)
        self.models: dict[str, deque[float]] = {}
        self._interval_s = interval_s

    def answered(self, answer: Sample | TrimsError, now: float, mounts: int = 1) -> None:
        """Take an answer in, of one of so many *mounts*."""
        pauses = PAUSES
        if isinstance(answer, TrimsError):
            self.problem = answer
        else:
            pauses *= mounts
            self._take(answer)
        self.due = max(self.asked + self._interval_s, now + pauses * (now - self.asked))

    def _take(self, answer: Sample) -> None:
        before, self.sample, self.problem = self.sample, answer, None
        if before is None or before.facts["server_pid"] != answer.facts["server_pid"]:  # which counts anew
            return
        seconds = answer.taken - before.taken
        fetched = "fetch_fetched_bytes_total"
        self.rates.append((answer.number(fetched) - before.number(fetched)) / seconds)
        self.models = {path: self.models.get(path, deque(maxlen=RATES)) for path in answer.models}
        for path, rates in self.models.items():
            known = before.models.get(path, Model())
            rates.append(max(0, answer.models[path].disk - known.disk) / seconds)
