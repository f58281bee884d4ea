"""Members of a fleet: each has a host, a cache, a mount and an nginx of its own."""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mountctl.extras.fleet.nginx import Member as ServedMount
from mountctl.extras.fleet.nginx import Nginx
from tests.fleet.stores import FleetStore
from tests.services import run_daemon
from tests.support.certificates import Authority, Identity
from tests.support.mounts import LAZY, MountedStore, let_in, log_beside, trimsfs, wait_until
from tests.support.network import Host
from trimsfs.options import MountOptions

NAME = "tests"
PORT = 7443
GONE_S = 20
"""How long the processes of a member that is down may take to end."""
USER = "nobody"
"""Of servers and of nginx, which looks for a name."""


@dataclass(slots=True)
class Member:
    """A host that may be up."""

    host: Host
    directory: Path
    identity: Identity
    strangers: frozenset[int] = frozenset()
    """Processes of the host that ran before it was a member."""
    running: ExitStack = field(default_factory=ExitStack)
    """What ends when it goes down."""
    ticks: dict[tuple[int, str], int] = field(default_factory=dict)
    """Processor time by process and when it started."""

    @property
    def entry(self) -> str:
        """How the list of members names it."""
        return f"{self.host.name}:{PORT}"

    @property
    def mount(self) -> MountedStore:
        """Its mount, if it is up."""
        return MountedStore(self.directory / "models", self.directory / "cache")

    def pids(self) -> list[int]:
        """Its processes."""
        return [pid for pid in self.host.namespace.pids() if pid not in self.strangers]

    def freeze(self) -> None:
        """Stop its processes; `thaw` has them go on."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End all of its processes at once, as by a loss of power, but that the others are told by its kernel."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def cpu_s(self) -> float:
        """Processor time of its processes so far; of one that has ended, until the last call before.

        Servers do not wait for their children, so the kernel adds their time to no parent's.
        """
        for pid in self.pids():
            with suppress(OSError):
                # After the name, which may hold anything, the third field of proc_pid_stat(5) comes first.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self.ticks[pid, fields[19]] = sum(map(int, fields[11:13]))
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Fleet:
    """Members with one list of them, in a directory of the fleet's own; or hosts that each fetch alone."""

    directory: Path
    store: FleetStore
    members: Sequence[Member]
    options: Sequence[str]
    authority: Authority
    alone: bool

    def announce(self, members: Sequence[Member]) -> None:
        """Have the list name these members and no others."""
        fresh = self.directory / "members.new"
        fresh.write_text("".join(f"{member.entry}\n" for member in members))
        fresh.rename(self.directory / "members")

    def up(self, members: Sequence[Member]) -> None:
        """Mount on these members, whose caches are as they were left, and have their nginx serve."""
        with ThreadPoolExecutor(len(members)) as threads:
            for made in [threads.submit(self._mount, member) for member in members]:
                made.result()
        for member in () if self.alone else members:
            self._serve(member)

    def down(self, member: Member) -> None:
        """Unmount, and end what is left of the member's processes."""
        member.thaw()
        member.running.close()

    def _mount(self, member: Member) -> None:
        options = {} if self.alone else self._options(member)
        member.mount.path.mkdir(parents=True, exist_ok=True)
        let_in(member.directory)
        done = trimsfs(
            "mount",
            member.mount.path,
            *("--store", self.store.url, "--cache-dir", member.mount.cache),
            *("--log-file", log_beside(member.directory)),
            *(f"{name}={value}" for name, value in options.items()),
            *self.options,
            environment=self.store.environment(),
            before=member.host.namespace.before,
        )
        member.running.callback(self._unmount, member)
        assert done.returncode == 0, done.stderr

    def _unmount(self, member: Member) -> None:
        # Containers of tests that run beside this one have copies of all mounts.
        trimsfs("umount", LAZY, member.mount.path)
        try:
            wait_until(lambda: not member.pids(), GONE_S)
        except AssertionError:
            member.kill()

    def _serve(self, member: Member) -> None:
        nginx = Nginx(member.directory / "nginx")
        options = MountOptions(cache_dir=member.mount.cache, **self._options(member))
        served = ServedMount(mountpoint=member.mount.path, options=options)
        member.host.namespace.call(lambda: nginx.write([served]))
        command = [*member.host.namespace.before, *nginx.command()]
        daemon = run_daemon("nginx", command, member.directory / "nginx.log", os.environ)
        member.running.enter_context(daemon)

    def _options(self, member: Member) -> dict[str, str]:
        return {
            "server_user": USER,
            "fleet": NAME,
            "fleet_members": str(self.directory / "members"),
            "fleet_listen": member.entry,
            "fleet_ca": str(self.authority.certificate),
            "fleet_cert": str(member.identity.certificate),
            "fleet_key": str(member.identity.key),
        }


@contextmanager
def a_fleet(
    directory: Path, store: FleetStore, hosts: Sequence[Host], *options: str, alone: bool = False
) -> Iterator[Fleet]:
    """A fleet of these hosts, none of which is up; all of them are down at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    let_in(directory)
    authority = Authority(directory)
    members = [
        Member(host, directory / host.address, authority.identity(host.address), frozenset(host.namespace.pids()))
        for host in hosts
    ]
    fleet = Fleet(directory, store, members, options, authority, alone)
    fleet.announce(members)
    try:
        yield fleet
    finally:
        for member in members:
            fleet.down(member)
