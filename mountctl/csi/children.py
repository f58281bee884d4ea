"""What may wait for a mount is done by child processes, each with a deadline.

A process whose request has been read by a server that then says nothing cannot even be killed. Such a child is left
behind, and until it has ended its mount is not asked again: there are never many of them.
"""

import os
import subprocess
import threading
from pathlib import Path

from mountctl.csi.refusals import RefusedError, unavailable
from trimsfs.mountinfo import Mount

ANSWER_TIMEOUT_S = 5.0
"""How long a mount may take to answer when the store is not asked."""
KILL_TIMEOUT_S = 0.3


class Children:
    """The child processes of the driver."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[str, list[subprocess.Popen[str]]] = {}

    def run(
        self, mount: Mount, command: list[str | Path], timeout_s: float
    ) -> "subprocess.CompletedProcess[str] | None":
        """Run a command that touches a mount; None when it did not end in time. Raises RefusedError."""
        with self._lock:
            left = [process for process in self._left.get(mount.device, []) if process.poll() is None]
            self._left[mount.device] = left
        if left:
            raise no_answer(mount)
        # Without any argument for which Popen would fork: beside gRPC's threads that is not safe.
        process = subprocess.Popen(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
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
                with self._lock:
                    self._left[mount.device].append(process)
            return None
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def check_answers(self, mount: Mount, path: Path | None = None) -> tuple[int, int]:
        """Ask a mount for something, at a path of it: total and free bytes. Raises RefusedError (UNAVAILABLE)."""
        where = path or mount.mountpoint
        done = self.run(mount, ["stat", "-f", "-c", "%S %b %f", "--", where], ANSWER_TIMEOUT_S)
        if done is None:
            raise no_answer(mount)
        if done.returncode != 0:
            raise unavailable(f"{where}: {done.stderr.strip().rpartition(': ')[2]}: its server is gone: see its log")
        size, total, free = map(int, done.stdout.split())
        return size * total, size * free


def no_answer(mount: Mount) -> RefusedError:
    """A mount that does not answer."""
    return unavailable(f"{mount.mountpoint} does not answer: see its log, or `mountctl abort {mount.mountpoint}`")
