"""Somebody who warms, evicts, pins and unpins models all the time."""

import errno
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

from tests.reliability.readers import FAILURES
from tests.support.readers import Report

VERBS = ("warm-disk", "warm-host", "warm-disk", "evict", "evict", "evict", "pin", "unpin", "unpin")
PATIENCE_S = 10.0
"""After which a command is ended, as who gives one may do."""
NOT_THERE = FAILURES | {errno.ENOENT}
"""Of a command on what may be deleted, or whose server is followed by another."""


class Commander:
    """Gives commands on models and directories. That one fails is its own affair; that it hangs, or gives an error that
    is not documented, is not."""

    def __init__(self, mount: Path, names: Sequence[str], seed: int) -> None:
        self._mount = mount
        self._targets = sorted({*names, *(os.path.dirname(name) for name in names)})
        self._draw = random.Random(seed)
        self.report = Report()

    def round(self) -> None:
        """Give one command, and mostly wait for its end."""
        target = self._mount / self._draw.choice(self._targets)
        verb = self._draw.choice(VERBS)
        patience_s = PATIENCE_S if self._draw.random() < 0.8 else self._draw.uniform(0, 0.5)
        try:
            with self.report.timing(verb):
                descriptor = os.open(target.parent / ".trims" / target.name / verb, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._follow(verb, descriptor, time.monotonic() + patience_s)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise

    def _follow(self, verb: str, descriptor: int, until: float) -> None:
        state = "running"
        while state == "running" and time.monotonic() < until:
            with self.report.timing(verb):
                text = os.read(descriptor, 1 << 16)
            if not text:
                return
            state = json.loads(text.splitlines()[-1])["state"]
