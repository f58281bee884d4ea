"""Hosts of one network: a network namespace for each, with a link of its own to a bridge. They need root.

A namespace has no name and no file: a process holds it, which the kernel kills with the thread that started it.
"""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Literal, TypeVar

from tests.support.mounts import wait_until

T = TypeVar("T")

MEGABIT = 10**6 // 8
"""Bytes a second."""
TIMEOUT_S = 30
_SUBNETS = {4: "10.77.0.{}/24", 6: "fd00:77::{}/64"}
_BURST = 128 << 10
"""Bytes that a link carries at once: two packets as large as a sender hands them over."""
_QUEUE = "50ms"
"""What a link queues, by how long it takes to send it."""
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace, by the process that holds it."""

    holder: "subprocess.Popen[bytes]"

    @property
    def file(self) -> Path:
        """Names the namespace to the kernel."""
        return Path(f"/proc/{self.holder.pid}/ns/net")

    @property
    def before(self) -> tuple[str, ...]:
        """Starts a program in it."""
        return ("nsenter", f"--net={self.file}", "--")

    def run(self, *command: str) -> str:
        done = subprocess.run([*self.before, *command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def disable_ipv6(self) -> None:
        """Have no interface take an address of IPv6, as an operator does by sysctl.conf."""
        setting = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")  # of the namespace that looks

        def disable() -> None:
            if setting.exists():  # else the kernel has no IPv6
                setting.write_text("1")

        self.call(disable)

    def pids(self) -> list[int]:
        """The processes in it, without the one that holds it."""
        try:
            inode, found = self.file.stat().st_ino, list[int]()
        except FileNotFoundError:  # the holder was killed
            return []
        for process in Path("/proc").iterdir():
            if process.name.isdecimal() and int(process.name) != self.holder.pid:
                with suppress(OSError):
                    if (process / "ns/net").stat().st_ino == inode:
                        found.append(int(process.name))
        return found

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in a thread that is in the namespace; so are the threads that it starts."""
        answers: list[T] = []
        errors: list[BaseException] = []

        def called() -> None:
            try:
                _enter(self.file)
                answers.append(function())
            except BaseException as error:
                errors.append(error)

        thread = Thread(target=called)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return answers[0]


@dataclass(frozen=True, slots=True)
class Host:
    """A host by its address, in a namespace of its own."""

    namespace: Namespace
    address: str
    port: str
    """The other end of its link, in the namespace of the bridge."""
    switch: Namespace

    @property
    def name(self) -> str:
        """The address as a URL has it."""
        return f"[{self.address}]" if ":" in self.address else self.address

    def limit(self, *, up: int | None = None, down: int | None = None) -> None:
        """Have its link carry only so many bytes a second from it and to it; None leaves that way as it is."""
        if up is not None:
            self.namespace.run(*_limit("eth0", up))
        if down is not None:
            self.switch.run(*_limit(self.port, down))

    def unplug(self) -> None:
        """Lose all packets from it and to it from now on; neither end sees that."""
        self.switch.run("ip", "link", "set", self.port, "nomaster")

    def plug(self) -> None:
        self.switch.run("ip", "link", "set", self.port, "master", "bridge")

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Lose all packets from it and to it in this block."""
        self.unplug()
        try:
            yield
        finally:
            self.plug()


def _limit(device: str, rate: int) -> tuple[str, ...]:
    shape = ("rate", f"{rate * 8}bit", "burst", str(_BURST), "latency", _QUEUE)
    return ("tc", "qdisc", "replace", "dev", device, "root", "tbf", *shape)


@dataclass(slots=True)
class Network:
    """A bridge, in a namespace of its own, and the hosts at it.

    Each has an address of IPv4, or of *version* 6. If they have that version *only*, they have no address of the other,
    not even of their loopback.
    """

    switch: Namespace
    holders: list["subprocess.Popen[bytes]"]
    version: Literal[4, 6] = 4
    only: bool = False
    hosts: list[Host] = field(default_factory=list)

    def host(self, rate: int) -> Host:
        """Another host. Its link carries *rate* bytes a second each way."""
        number = len(self.hosts) + 1
        namespace, port = _namespace(self.holders), f"port{number}"
        subnet = _SUBNETS[self.version].format(number)
        host = Host(namespace, subnet.partition("/")[0], port, self.switch)
        other_end = ("peer", "name", "eth0", "netns", str(namespace.holder.pid))
        self.switch.run("ip", "link", "add", port, "type", "veth", *other_end)
        self.switch.run("ip", "link", "set", port, "master", "bridge", "up")
        if self.only and self.version == 6:
            namespace.run("ip", "-4", "address", "flush", "dev", "lo")
        elif self.only:
            namespace.disable_ipv6()
        # With nodad, an address of IPv6 may be used at once: nobody else can have it.
        options = ("nodad",) if self.version == 6 else ()
        namespace.run("ip", "address", "add", subnet, "dev", "eth0", *options)
        namespace.run("ip", "link", "set", "eth0", "up")
        host.limit(up=rate, down=rate)
        self.hosts.append(host)
        return host


@contextmanager
def a_network(version: Literal[4, 6] = 4, *, only: bool = False) -> Iterator[Network]:
    """A network without hosts, whose namespaces go with it; what still runs in them is killed.

    *version* and *only* are as of `Network`.
    """
    holders: list[subprocess.Popen[bytes]] = []
    try:
        switch = _namespace(holders)
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        yield Network(switch, holders, version, only)
    finally:
        for holder in holders:
            for pid in Namespace(holder).pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            holder.kill()
            holder.wait(TIMEOUT_S)


def _namespace(holders: list["subprocess.Popen[bytes]"]) -> Namespace:
    command = ["setpriv", "--pdeathsig=KILL", "--", "unshare", "--net", "sleep", "infinity"]
    # In a session of its own: a signal to all processes of the tests is for the tests, which end it last.
    namespace = Namespace(subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True))
    holders.append(namespace.holder)
    ours = Path("/proc/self/ns/net").stat().st_ino
    wait_until(lambda: namespace.file.stat().st_ino != ours, tolerate=OSError)
    namespace.run("ip", "link", "set", "lo", "up")
    return namespace


def _enter(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)
