"""Talks to systemd: readiness, the watchdog, and descriptors that it stores for the next start of a service."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping

_FIRST_DESCRIPTOR = 3


class Notifier:
    """Sends messages to the service manager by sd_notify(3); does nothing if there is no manager."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        interval_us = int(environment.get("WATCHDOG_USEC", "0") or 0)
        wanted = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._interval_s = interval_us / 2e6 if wanted and interval_us else None
        self._next = 0.0

    def tell(self, *lines: str, descriptors: tuple[int, ...] = ()) -> None:
        """Send some assignments, such as ``READY=1``."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.setblocking(False)
            end.connect(address)
            socket.send_fds(end, ["\n".join(lines).encode()], descriptors)

    def store(self, descriptors: Mapping[str, int]) -> None:
        """Let the manager store descriptors, by name, for the next start of this service."""
        for name, descriptor in descriptors.items():
            self.tell("FDSTORE=1", f"FDNAME={name}", descriptors=(descriptor,))

    def unstore(self, names: tuple[str, ...]) -> None:
        """Let the manager close stored descriptors."""
        for name in names:
            self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def alive(self) -> None:
        """Feed the watchdog, when it is due."""
        now = time.monotonic()
        if self._interval_s is not None and now >= self._next:
            self._next = now + self._interval_s
            self.tell("WATCHDOG=1")


def stored_descriptors(environment: Mapping[str, str]) -> dict[str, int]:
    """The descriptors that the manager has stored since the last run of this service, by name."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    count = int(environment.get("LISTEN_FDS", "0"))
    descriptors = dict(zip(names, range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + count), strict=False))
    for descriptor in descriptors.values():
        os.set_inheritable(descriptor, False)
    return descriptors
