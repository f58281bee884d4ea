"""Stands in for systemd, by the protocol of sd_notify(3)."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STARTER = """
import fcntl, os, sys
kept, command = [int(number) for number in sys.argv[1].split(",") if number], sys.argv[2:]
copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100) for descriptor in kept]
for descriptor in kept:
    os.close(descriptor)
for number, descriptor in enumerate(copies, 3):
    os.dup2(descriptor, number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(command[0], command)
"""


class Manager:
    """Starts a service, hears what it says and keeps its descriptors, as systemd does."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._address = str(directory / "notify")
        self._socket.bind(self._address)
        self._log = directory / "service.log"
        self.stored: dict[str, int] = {}
        self.said: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """Start the service with what was stored, as descriptors 3 and up."""
        names, descriptors = list(self.stored), list(self.stored.values())
        environment = os.environ | {
            "NOTIFY_SOCKET": self._address,
            "WATCHDOG_USEC": "1000000",
            "TRIMSFS_CONFIG": "/dev/null",
        }
        if names:
            environment |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}

        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", STARTER, ",".join(map(str, descriptors)), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                start_new_session=True,
            )

    def hear(self, wanted: str, timeout_s: float = 30) -> None:
        """Wait until the service says something."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.said:
            assert select.select([self._socket], [], [], max(0, deadline - time.monotonic()))[0], self.log()
            data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 4)
            lines = data.decode().split("\n")
            self.said += lines
            if "FDSTORE=1" in lines:
                name = next(line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME="))
                self.stored[name] = descriptors[0]
            if "FDSTOREREMOVE=1" in lines and (name := lines[1].removeprefix("FDNAME=")) in self.stored:
                os.close(self.stored.pop(name))

    def log(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        """End all of the service at once, as a watchdog or the OOM killer would."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in (self.process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(20)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(40)
        for descriptor in self.stored.values():
            os.close(descriptor)
        self._socket.close()
