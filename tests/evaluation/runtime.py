"""Zygotes as the harness sees them: requests in, answers out, from any number of threads."""

import json
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.mounts import TRIMSFS

PROGRAM = Path(__file__).with_name("zygote.py")
START_S, ANSWER_S, STOP_S = 120, 300, 20


class RequestError(RuntimeError):
    """A request that was not answered, or with an error."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds of each phase of a request, bytes of memory that it wrote to meanwhile, and the digest of its output."""

    load_s: float
    create_s: float
    forward_s: float
    free_s: float
    total_s: float
    private_bytes: int
    output: str


class Zygote:
    """A running zygote."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._number = 0
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, directory: Path, shape: Sequence[int], *, ideal: bool = False, memory: bool = False) -> Answer:
        """Have one process load the model in a directory and infer with it. Raises RequestError."""
        waiting = Future[dict[str, Any]]()
        with self._lock:
            self._number += 1
            number = self._number
            self._waiting[number] = waiting
            request = {"id": number, "directory": str(directory), "shape": list(shape)}
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps({**request, "ideal": ideal, "memory": memory}) + "\n")
                self._process.stdin.flush()
            except OSError as error:
                raise RequestError(f"{directory}: {error}") from None
        try:
            answer = waiting.result(ANSWER_S)
        except (TimeoutError, CancelledError):
            raise RequestError(f"{directory}: not answered") from None
        if "error" in answer:
            raise RequestError(f"{directory}: {answer['error']}")
        return Answer(**{name: answer[name] for name in Answer.__slots__})

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            with self._lock:
                waiting = self._waiting.pop(answer["id"])
            waiting.set_result(answer)
        with self._lock:
            for waiting in self._waiting.values():
                waiting.cancel()


@contextmanager
def zygote(python: str, log: Path, *, shared: bool = False, once: bool = False) -> Iterator[Zygote]:
    """A zygote of an interpreter that has MXNet, under ``trimsfs run`` or not; its messages go to a file.

    One that answers *once* does so by itself, without a child.
    """
    runner = [TRIMSFS, "run", "--"] if shared else []
    options = ["--once"] if once else []
    with log.open("ab") as messages:
        process = subprocess.Popen(
            [*runner, python, "-W", "ignore", str(PROGRAM), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
        )
    hung = threading.Timer(START_S, process.kill)
    hung.start()
    try:
        assert process.stdout is not None
        if '"ready"' not in process.stdout.readline():
            raise RequestError(f"{python} did not start: see {log}")
        hung.cancel()
        yield Zygote(process)
    finally:
        hung.cancel()
        assert process.stdin is not None
        with suppress(OSError):  # it has ended, and what it was asked last is not written
            process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
