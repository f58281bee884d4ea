"""Runs a command that touches a mount, and so may hang, in a child process with a deadline.

While a server does not answer a request that it has read, a process that waits for it cannot be killed.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

KILL_TIMEOUT_S = 0.3


class HangsError(Exception):
    """A command has not ended in time. Its process is killed; it runs on while it cannot be."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__(process.args)
        self.process = process


def run(command: Sequence[str | Path], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Run a command; its output, in English. Raises HangsError, OSError."""
    # No argument that would make Popen fork, which is not safe beside the threads of gRPC.
    process = subprocess.Popen(
        command,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.communicate(timeout=KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()
        raise HangsError(process) from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
