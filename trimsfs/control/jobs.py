"""Jobs: commands that go on in the server when who gave them has gone, until they end or are cancelled."""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import trio

from trimsfs.control.progress import Progress
from trimsfs.handover.ledger import UNRECORDED, Ledger, Record, RecordKind
from trimsfs.types import Generation

MOST_ENDED = 32
"""Jobs that stay listed once they have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A command by its name, for the file of a generation or for all below a directory, from a user."""

    name: str
    path: str
    generation: Generation | None
    uid: int


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """A command that goes on by itself; ``began`` and ``ended`` are in seconds since the epoch.

    ``over`` is set once it has ended, and ``result`` is what its progress has come to.
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
        """What is told of it."""
        about: dict[str, object] = {"id": self.id, "command": self.order.name, "uid": self.order.uid}
        return about | {"began": self.began, "ended": self.ended} | (self.result or self.progress.facts())

    def packed(self) -> bytes:
        """What the ledger has of it."""
        recorded = {"id": self.id, "order": asdict(self.order), "began": self.began, "ended": self.ended}
        return json.dumps(recorded | {"result": self.result}).encode()


class Jobs:
    """The jobs of a mount. The *ledger* has them for the next server, which goes on with those that have not ended.

    *outage* tells jobs why the store does not answer, while it does not.
    """

    def __init__(self, ledger: Ledger, outage: Callable[[], str | None]) -> None:
        self._ledger = ledger
        self._outage = outage
        self._jobs: dict[str, Job] = {}
        inherited = map(self._unpacked, ledger.inherited(RecordKind.JOB))
        for job in sorted(inherited, key=lambda job: (job.began, job.ended is not None)):
            if job.id in self._jobs:  # its server was killed while it recorded the end
                ledger.set_count(self._jobs[job.id].slot, 0)
            self._jobs[job.id] = job

    def _unpacked(self, record: Record) -> Job:
        recorded = json.loads(record.content)
        order = recorded.pop("order")
        if order["generation"] is not None:
            order["generation"] = Generation(**order["generation"])
        progress = Progress(order["path"], self._outage, patient=True)
        job = Job(order=Order(**order), progress=progress, slot=record.slot, **recorded)
        if job.ended is not None:
            job.over.set()
        return job

    def add(self, order: Order) -> Job:
        """A new job."""
        progress = Progress(order.path, self._outage, patient=True)
        job = Job(id=secrets.token_hex(4), order=order, began=time.time(), progress=progress)
        self._jobs[job.id] = job
        self._record(job)
        return job

    def end(self, job: Job) -> None:
        """A job has ended; of too many that have, the first is forgotten."""
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
        """Those that have not ended."""
        return [job for job in self._jobs.values() if job.ended is None]

    def below(self, prefix: str) -> list[Job]:
        """Those about a directory or anything below it, the first one first."""
        return [job for job in self._jobs.values() if job.order.path.startswith(prefix)]

    def find(self, number: str, prefix: str) -> Job | None:
        """The job of this id, if it is about a directory or anything below it."""
        job = self._jobs.get(number)
        return job if job is not None and job.order.path.startswith(prefix) else None
