"""Processes with CUDA that tests drive call by call; what they can do is in `program.py`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

_ROOT = Path(__file__).parents[2]
_MESSAGE_LIMIT = 1 << 16
PATIENCE_S = 30


class CudaError(Exception):
    """A function of the driver has failed in the process; its text is the name of the error."""


class EndedError(Exception):
    """The process has ended instead of answering; its text is the exit status."""


class CudaProcess:
    """A process; methods that it has not itself are those of `program.Told`."""

    def __init__(self, process: "subprocess.Popen[bytes]", end: socket.socket) -> None:
        self._process = process
        self._end = end
        self.received: list[int] = []
        """Descriptors that came with the last answer: whoever uses them closes them."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def asked(*arguments: Any, descriptors: tuple[int, ...] = (), **options: Any) -> Any:
            self.begin(name, *arguments, descriptors=descriptors, **options)
            return self.end()

        return asked

    def begin(self, name: str, *arguments: Any, descriptors: tuple[int, ...] = (), **options: Any) -> Self:
        """Have something done, and do not wait."""
        socket.send_fds(self._end, [json.dumps([name, arguments, options]).encode()], descriptors)
        return self

    def end(self) -> Any:
        """What came of it. Raises CudaError and EndedError."""
        try:
            data, self.received, _, _ = socket.recv_fds(self._end, _MESSAGE_LIMIT, 4)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EndedError(str(self._process.wait(PATIENCE_S)))
        answer = json.loads(data)
        if "error" in answer:
            raise CudaError(answer["error"])
        return answer["value"]

    def export(self, handle: int) -> int:
        """A descriptor of what cuMemCreate made, in this process."""
        self.begin("export", handle).end()
        (descriptor,) = self.received
        return descriptor

    def kill(self) -> None:
        """By SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(PATIENCE_S)


Start = Callable[..., CudaProcess]
"""The fixture ``start``: starts a process in which a device is current."""


@contextlib.contextmanager
def cuda_process(environment: Mapping[str, str]) -> Iterator[CudaProcess]:
    """A process that lives as long as the context, and is killed at its end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE_S)
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cuda.program", str(theirs.fileno())],
            env=os.environ | environment,
            cwd=_ROOT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            yield CudaProcess(process, ours)
        finally:
            process.kill()
            process.wait()
