"""Jobs: commands that outlive the process that gave them, until they end or are cancelled."""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import trio

from trimsfs.control.progress import Progress
from trimsfs.handover.ledger import UNRECORDED, Ledger, Record, RecordKind
from trimsfs.types import Generation

MOST_ENDED = 32
"""Most ended jobs that stay listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A user's command, by its name, for the file of a generation or for all files below a directory."""

    name: str
    path: str
    generation: Generation | None
    uid: int


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A command that outlives its process. ``began`` and ``ended`` are in seconds since the epoch.

    ``over`` is set once it has ended; ``result`` is its final progress.
    """

    id: str
    order: Order
    began: float
    progress: Progress
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)
    ended: float | None = None
    result: dict[str, object] | None = None
    slot: int = UNRECORDED

    def facts(self) -> dict[str, object]:
        """The job as control files report it."""
        about: dict[str, object] = {"id": self.id, "command": self.order.name, "uid": self.order.uid}
        return about | {"began": self.began, "ended": self.ended} | (self.result or self.progress.facts())

    def packed(self) -> bytes:
        """The job as the ledger records it."""
        recorded = {"id": self.id, "order": asdict(self.order), "began": self.began, "ended": self.ended}
        return json.dumps(recorded | {"result": self.result}).encode()


class Jobs:
    """The jobs of a mount. The *ledger* records them for the next server, which continues those that have not ended.

    *outage* returns why the store of a path does not answer, or None.
    """

    def __init__(self, ledger: Ledger, outage: Callable[[str], str | None]) -> None:
        self._ledger = ledger
        self._outage = outage
        self._jobs: dict[str, Job] = {}
        inherited = map(self._unpacked, ledger.inherited(RecordKind.JOB))
        for job in sorted(inherited, key=lambda job: (job.began, job.ended is not None)):
            if job.id in self._jobs:  # its server was killed while recording the end
                ledger.set_count(self._jobs[job.id].slot, 0)
            self._jobs[job.id] = job

    def _unpacked(self, record: Record) -> Job:
        recorded = json.loads(record.content)
        order = recorded.pop("order")
        if order["generation"] is not None:
            order["generation"] = Generation(**order["generation"])
        progress = Progress(order["path"], partial(self._outage, order["path"]), patient=True)
        job = Job(order=Order(**order), progress=progress, slot=record.slot, **recorded)
        if job.ended is not None:
            job.over.set()
        return job

    def add(self, order: Order) -> Job:
        """Create and record a job."""
        progress = Progress(order.path, partial(self._outage, order.path), patient=True)
        job = Job(id=secrets.token_hex(4), order=order, began=time.time(), progress=progress)
        self._jobs[job.id] = job
        self._record(job)
        return job

    def end(self, job: Job) -> None:
        """Record the end of a job; forget the oldest if more than MOST_ENDED have ended."""
        job.ended, job.result = time.time(), job.progress.facts()
        self._record(job)
        job.over.set()
        ended = sorted((each for each in self._jobs.values() if each.ended), key=lambda each: each.ended or 0)
        for each in ended[:-MOST_ENDED]:
            self._ledger.set_count(each.slot, 0)
            del self._jobs[each.id]

    def _record(self, job: Job) -> None:
        before = job.slot
        job.slot = self._ledger.add(RecordKind.JOB, 0, job.packed())
        self._ledger.set_count(before, 0)

    def under_way(self) -> list[Job]:
        """The jobs that have not ended."""
        return [job for job in self._jobs.values() if job.ended is None]

    def below(self, prefix: str) -> list[Job]:
        """The jobs for a directory or anything below it, the oldest first."""
        return [job for job in self._jobs.values() if job.order.path.startswith(prefix)]

    def find(self, number: str, prefix: str) -> Job | None:
        """The job of this id, if it is for a directory or anything below it; else None."""
        job = self._jobs.get(number)
        return job if job is not None and job.order.path.startswith(prefix) else None
