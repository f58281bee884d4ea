"""Processes with CUDA that tests drive call by call; what they can do is in `program.py`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
        self.pid = process.pid

    def __getattr__(self, name: str) -> Any:
        """Have something done. Raises CudaError and EndedError."""
        if name.startswith("_"):
            raise AttributeError(name)

        def asked(*arguments: Any, descriptors: tuple[int, ...] = (), **options: Any) -> Any:
            socket.send_fds(self._end, [json.dumps([name, arguments, options]).encode()], descriptors)
            try:
                data, received, _, _ = socket.recv_fds(self._end, _MESSAGE_LIMIT, 4)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EndedError(str(self._process.wait(PATIENCE_S)))
            answer = json.loads(data)
            if "error" in answer:
                raise CudaError(answer["error"])
            return received[0] if received else answer["value"]

        return asked

    def kill(self) -> None:
        """By SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(PATIENCE_S)


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
