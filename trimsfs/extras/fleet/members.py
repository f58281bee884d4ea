"""The members of a fleet: read again every few seconds from a list, a file or a DNS name."""

import ipaddress
import logging
import math
import random
import re
import secrets
import socket
import time
from pathlib import Path

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.listen_address import MOST_PORT, ListenAddress

_NAME = re.compile(r"[A-Za-z0-9._-]+")
log = logging.getLogger(__name__)

INTERVAL_S, FIRST_S = 5.0, 1.0
"""How often the members are read, and how long a server that starts waits for them at most."""
SETTLED_S = 1.0
"""How old a change of the file must be: a program may still be writing it."""
RESOLVED_S, UNRESOLVED_S = 300.0, 60.0
"""For how long the addresses of a name count at most, and for how long one that has none is not tried again. Hundreds
of hosts look up hundreds of names each."""
RESOLVING_S = 3.0
"""How long names are looked up each time that the list is read. A lookup may take long if DNS does not answer."""


class Members:
    """The addresses of a fleet's members, as ``HOST:PORT``; ``mine`` are this host's own.

    A host may be listed by several, which others take for several members. It must know all of them: a request to
    itself would wait for the request that it is made for. Others may list a host before it is in its own list: then
    ``mine`` is what they probably call it. An address that is translated on the way is `found` by a request, which
    tells this server's ``instance``. ``problem`` tells why the list was not read. *listed* is the option
    ``fleet_members``. This host serves the fleet at *listen*.
    """

    def __init__(self, listed: str, listen: ListenAddress) -> None:
        self._listed = listed
        self._listen = listen
        self._read_once, self._settled = False, True
        self._answering_here: frozenset[str] = frozenset()
        self._names: dict[str, tuple[list[str], float]] = {}
        self.problem: str | None = None
        self.instance = secrets.token_hex(8)
        self.addresses: frozenset[str] = frozenset()
        self.mine: frozenset[str] = frozenset()

    @property
    def me(self) -> str | None:
        """The address that this host gives of itself; None if it is not listed."""
        return min(self.mine & self.addresses, default=None)

    def found(self, address: str) -> None:
        """Note that this very host answers at an address."""
        if address not in self._answering_here:
            log.info("fleet: this host answers at %s as well", address)
        self._answering_here |= {address}
        self.mine = self.mine & self.addresses | {address}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read the members, and again every INTERVAL_S."""
        with trio.move_on_after(FIRST_S):
            await self.refresh()
        task_status.started()
        while True:
            await trio.sleep(INTERVAL_S if self._read_once and self._settled else FIRST_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the members. If that fails, the earlier list stays."""
        before, problem = self.problem, None
        try:
            addresses, mine = await in_thread(self._look, abandon_on_cancel=True)
        except ValueError as error:
            problem = str(error)
        self._settled = not self._read_once or await in_thread(self._is_settled)
        if not self._settled:
            return
        self.problem = problem
        if problem is not None:
            if problem != before:
                stays = "the earlier list stays" if self._read_once else "this host fetches alone"
                log.warning("fleet: members not read, %s: %s: %s", stays, self._listed, problem)
            return
        if self._read_once and (addresses, mine) == (self.addresses, self.mine):
            return
        self._read_once, self.addresses, self.mine = True, addresses, mine
        if self.me is None:
            log.warning(
                "fleet: this host is not on the list of members, of %d: none asks it for chunks", len(addresses)
            )
        else:
            log.info("fleet: this host is %s, members on the list: %d", self.me, len(addresses))

    def _is_settled(self) -> bool:
        """Whether nobody was writing the list when it was read."""
        try:
            return "/" not in self._listed or not 0 <= time.time() - Path(self._listed).stat().st_mtime < SETTLED_S
        except OSError:
            return True

    def _look(self) -> tuple[frozenset[str], frozenset[str]]:
        """As `read`, with a guess where this host is not listed. Raises ValueError."""
        addresses, mine = self.read(resolving_s=RESOLVING_S)
        host, mine = self._listen.host, mine | self._answering_here & addresses
        if not mine and ipaddress.ip_address(host).is_unspecified:
            host = _source(self._split(min(addresses))[0])
        return addresses, mine or frozenset({_address(host, self._listen.port)} if host else ())

    def read(self, *, resolving_s: float = math.inf) -> tuple[frozenset[str], frozenset[str]]:
        """The members, and which of them are this host: after *resolving_s*, no other name is looked up. Raises
        ValueError."""
        try:
            return self._read(resolving_s)
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from None

    def _read(self, resolving_s: float) -> tuple[frozenset[str], frozenset[str]]:
        if "/" in self._listed:
            lines = Path(self._listed).read_text().splitlines()
            entries = [entry for line in lines if (entry := line.partition("#")[0].strip())]
        else:
            entries = [entry.strip() for entry in self._listed.split(",") if entry.strip()]
            if len(entries) == 1 and not _is_ip(self._split(entries[0])[0]):
                host, port = self._split(entries[0])
                entries = [_address(ip, port) for ip in _resolved(host)]
        if not entries:
            raise ValueError("no member is listed")
        addresses = frozenset(_address(*self._split(entry)) for entry in entries)
        until, own = time.monotonic() + resolving_s, socket.gethostname().partition(".")[0]
        own_first = sorted(addresses, key=lambda address: not address.startswith(own))
        return addresses, frozenset(address for address in own_first if self._is_me(address, until))

    def _split(self, entry: str) -> tuple[str, int]:
        """The host and port of an entry; an IP address as every host spells it. Raises ValueError."""
        host, colon, port = entry.rpartition(":")
        if not colon or entry.endswith("]"):
            host, port = entry, str(self._listen.port)
        host = host.strip("[]")
        if not port.isdecimal() or not 0 < int(port) <= MOST_PORT or not (_is_ip(host) or _NAME.fullmatch(host)):
            raise ValueError(f"{entry!r} is not HOST:PORT")
        return (str(ipaddress.ip_address(host)) if _is_ip(host) else host), int(port)

    def _is_me(self, address: str, until: float) -> bool:
        host, port = self._split(address)
        if port != self._listen.port:
            return False
        addresses = [host] if _is_ip(host) else self._recently_resolved(host, until)
        listen = ipaddress.ip_address(self._listen.host)
        return any(_is_local(each) for each in addresses) if listen.is_unspecified else str(listen) in addresses

    def _recently_resolved(self, host: str, until: float) -> list[str]:
        """The IP addresses of a name, without a lookup after *until*; the earlier ones if it has none for now."""
        addresses, expires = self._names.get(host, ([], float("-inf")))
        now = time.monotonic()
        if expires <= now < until:
            try:
                addresses, lasts_s = _resolved(host), RESOLVED_S
            except (OSError, UnicodeError):  # UnicodeError: the name cannot have one
                lasts_s = UNRESOLVED_S
            self._names[host] = addresses, now + lasts_s * random.uniform(0.5, 1)  # noqa: S311 not all names at once
        return addresses


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolved(host: str) -> list[str]:
    """The IP addresses of a name. Raises OSError."""
    return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})


def _is_local(host: str) -> bool:
    """Whether this host has an IP address: the kernel then sends to it from there."""
    return ipaddress.ip_address(host).is_loopback or _source(host) == host


def _source(host: str) -> str:
    """The address that the kernel sends to a host from; empty if it cannot."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""
