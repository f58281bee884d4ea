"""Reads the control files of all mounts of this host at once.

The scraper is a process of its own. It is the only one that may need root. It parses nothing that a mount or a network
has sent. It answers on a pipe, with JSON.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from trimsfs.cli.control_reader import read_bytes
from trimsfs.mountinfo import Mount, file_systems
from trimsfs.polling import readable
from trimsfs.processes import container_of, open_paths, start_child, title_of

ANSWER_TIMEOUT_S = 5.0
"""How long mounts have for their answers: half of what Prometheus waits for a scrape."""
LONGEST = {"metrics": 2 << 20, "control": 1 << 20, "models": 32 << 20}
"""Most bytes of each control file, some ten times what a mount with 100 models and 10,000 files tells."""
MOST_BYTES = 128 << 20
"""Most bytes of one mount's answers as JSON."""
QUESTIONS = {b"metrics": ("metrics",), b"status": ("metrics", "control", "models")}
"""What can be asked, and the control files that answer it."""
_LONGEST_QUESTION = 16
TOO_LONG = "what it tells is too long"


def scrape_forever(connection: Connection, scraper: "Scraper") -> None:
    """Answer each question that comes, until the other end is closed."""
    while True:
        try:
            question = connection.recv_bytes(_LONGEST_QUESTION)
            connection.send_bytes(json.dumps(scraper.ask(QUESTIONS[question])).encode())
        except (EOFError, OSError, KeyError):
            return


@dataclass(slots=True)
class _Asked:
    """A mount that is asked by a child process, and the lines that have come of it."""

    mount: Mount
    pid: int
    said: bytearray = field(default_factory=bytearray)


class Scraper:
    """Asks mounts in child processes: one that waits for a mount that hangs may not even end when it is killed."""

    def __init__(self, timeout_s: float = ANSWER_TIMEOUT_S, mounts: Callable[[], list[Mount]] = file_systems) -> None:
        self._timeout_s = timeout_s
        self._mounts = mounts
        self._stuck: dict[str, int] = {}
        """Killed children that have not ended, by the device of the mount that they wait for."""

    def ask(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """For each mount: ``mountpoint``, ``store``, ``answers`` by control file, ``error`` or None, and whether it is
        ``hidden``, another user's that lets nobody else in."""
        asked: dict[int, _Asked] = {}
        results = []
        self._stuck = {device: pid for device, pid in self._stuck.items() if not _ended(pid)}
        for mount in self._mounts():
            if mount.device in self._stuck:
                results.append(_result(mount, b"", f"has not answered for more than {self._timeout_s:g} s"))
                continue
            try:
                receiver, pid = start_child(partial(_answer, mount, names))
            except OSError as error:
                results.append(_result(mount, b"", f"could not be asked: {error.strerror}"))
                continue
            asked[receiver] = _Asked(mount, pid)
        deadline = time.monotonic() + self._timeout_s
        while asked and (left := deadline - time.monotonic()) > 0:
            for receiver in readable(asked, left):
                piece = os.read(receiver, 1 << 16)
                asked[receiver].said += piece
                if not piece:
                    results.append(self._end(receiver, asked.pop(receiver)))
                elif len(asked[receiver].said) > MOST_BYTES:
                    results.append(self._end(receiver, asked.pop(receiver), TOO_LONG))
        for receiver, each in asked.items():
            results.append(self._end(receiver, each, f"did not answer in {self._timeout_s:g} s"))
        return sorted(results, key=lambda result: str(result["mountpoint"]))

    def _end(self, receiver: int, each: _Asked, late: str | None = None) -> dict[str, Any]:
        os.close(receiver)
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)
        if late is None:
            os.waitpid(each.pid, 0)
        elif not _ended(each.pid):
            self._stuck[each.mount.device] = each.pid
        return _result(each.mount, each.said, late)


def _ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _result(mount: Mount, said: bytes | bytearray, late: str | None) -> dict[str, Any]:
    """The answers of a mount. One that has given its metrics answers, whatever else is late."""
    answers: dict[str, Any] = {}
    problem, hidden = late, False
    for line in said.split(b"\n")[:-1]:
        name, answer = json.loads(line)
        if name == "error":
            problem, hidden = answer
        else:
            answers[name] = answer
    error = None if "metrics" in answers else problem or TOO_LONG
    return {
        "mountpoint": str(mount.mountpoint),
        "store": mount.source,
        "answers": answers,
        "error": error,
        "hidden": hidden,
    }


def _answer(mount: Mount, names: Sequence[str], pipe: int) -> None:
    """Ask a mount, in a process of its own: a line of JSON for each answer, as soon as it is there."""
    try:
        for name in names:
            text = read_bytes(mount.mountpoint / ".trims" / name, LONGEST[name] + 1)
            if len(text) <= LONGEST[name]:
                _say(pipe, name, text.decode(errors="replace"))
        if "models" in names and os.geteuid() == 0:
            _say(pipe, "users", _users(mount.device))
    except OSError as error:
        hidden = error.errno in {errno.EACCES, errno.EPERM}
        _say(pipe, "error", [error.strerror or str(error), hidden])


def _say(pipe: int, name: str, answer: object) -> None:
    text = json.dumps([name, answer]).encode() + b"\n"
    while text:
        text = text[os.write(pipe, text) :]


def _users(device: str) -> list[dict[str, object]]:
    """The processes that have files of a file system open or mapped, and the paths by which they know these."""
    return [
        {"pid": pid, "program": title_of(pid), "container": container_of(pid), "paths": sorted(paths)}
        for pid, paths in open_paths(device).items()
    ]
