"""The mounts of this host as the exporter knows them: what the scraper has told, shared by all who ask."""

import json
import math
import os
import socket
import struct
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from trimsfs.extras.exporter.history import History
from trimsfs.extras.exporter.merged_metrics import Families, merged, parsed
from trimsfs.extras.exporter.status_page import status
from trimsfs.processes import LOOK_INTERVAL_S

METRICS_AGE_S, STATUS_AGE_S = 1.0, 5.0
"""How long an answer is given to others who ask: however many do, mounts are asked no more often."""
_ANSWERED_BY = {b"metrics": (b"metrics", b"status"), b"status": (b"status",)}
"""Whose answers hold those of a question, too."""
_MOST_BYTES = 1 << 30
_GRACE_S = 5.0
"""How much later than mounts the scraper may answer."""

Scraped = list[tuple[dict[str, Any], Families | None]]


class ScraperGoneError(Exception):
    """The scraper has ended, or does not answer."""


class Mounts:
    """Asks the scraper over its *connection*. *whole*: it may look at other users' processes, and does.

    The scraper waits *timeout_s* for mounts. Safe to use from several threads.
    """

    def __init__(self, connection: Connection, *, whole: bool, timeout_s: float) -> None:
        self._connection = connection
        with socket.socket(fileno=os.dup(connection.fileno())) as end:  # for a scraper that is stopped while it answers
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", math.ceil(timeout_s + _GRACE_S), 0))
        self._looks = math.ceil((timeout_s + _GRACE_S) / LOOK_INTERVAL_S)
        self._whole = whole
        self._answered = threading.Condition()
        self._asking = False
        self._known: dict[bytes, tuple[float, Scraped]] = {}
        self._history = History()

    def sample(self) -> None:
        """Take a sample of all mounts for the plots."""
        self._history.add(time.time(), _families(self._ask(b"metrics", METRICS_AGE_S)))

    def metrics(self) -> bytes:
        """The metrics of all mounts, as Prometheus text."""
        return merged(_families(self._ask(b"metrics", METRICS_AGE_S)))

    def status(self) -> bytes:
        """What the status page shows, as JSON."""
        return status(self._ask(b"status", STATUS_AGE_S), self._history, whole=self._whole)

    def _ask(self, question: bytes, most_age_s: float) -> Scraped:
        oldest = time.monotonic() - most_age_s
        with self._answered:
            while (scraped := self._answer(question, oldest)) is None and self._asking:
                self._answered.wait()
            if scraped is not None:
                return scraped
            self._asking = True
        try:
            self._connection.send_bytes(question)
            # In short waits: while both processes were stopped, just one of them passes.
            if not any(self._connection.poll(LOOK_INTERVAL_S) for _ in range(self._looks)):
                self._connection.close()  # a late answer would be taken for the next one
                raise ScraperGoneError
            scraped = [_read(result) for result in json.loads(self._connection.recv_bytes(_MOST_BYTES))]
            self._known[question] = time.monotonic(), scraped
        except (EOFError, OSError) as error:
            raise ScraperGoneError from error
        finally:
            with self._answered:
                self._asking = False
                self._answered.notify_all()
        return scraped

    def _answer(self, question: bytes, oldest: float) -> Scraped | None:
        """What is known since a time, at least: one who waits takes any answer that comes meanwhile."""
        known = (self._known[each] for each in _ANSWERED_BY[question] if each in self._known)
        return next((scraped for at, scraped in known if at >= oldest), None)


def _read(result: dict[str, Any]) -> tuple[dict[str, Any], Families | None]:
    """What the scraper tells of a mount, with its metrics; None for one that does not answer."""
    if result["error"] is not None:
        return result, None
    try:
        return result, parsed(result["answers"]["metrics"])
    except ValueError as error:
        return result | {"error": str(error)}, None


def _families(scraped: Scraped) -> dict[str, Families | None]:
    """The metrics by mount point, without mounts that let nobody else in."""
    return {result["mountpoint"]: families for result, families in scraped if not result["hidden"]}
