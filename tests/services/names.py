"""dnsmasq: a real name server, on a host of a network."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.network import Host

from . import Daemon, accepts, run_daemon

PORT = 53
START_S = 30


@dataclass(frozen=True, slots=True)
class NameServer:
    """A server that answers with the addresses that it was told."""

    host: Host
    _hosts: Path
    _daemon: Daemon

    def tell(self, name: str, addresses: Sequence[str]) -> None:
        """Have a name, and no other, lead to these addresses."""
        self._hosts.write_text("".join(f"{address} {name}\n" for address in addresses))
        self._daemon.process.send_signal(signal.SIGHUP)


@contextlib.contextmanager
def a_name_server(host: Host, directory: Path, domain: str) -> Iterator[NameServer]:
    """Run a server that knows all names of a domain until the context ends; its files are in a directory."""
    hosts = directory / "hosts"
    hosts.touch()
    options = (
        *("--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv", "--bind-interfaces"),
        *(f"--addn-hosts={hosts}", f"--local=/{domain}/", f"--listen-address={host.address}", f"--port={PORT}"),
        *("--pid-file=", "--user=root", "--log-facility=-"),
    )
    command = [*host.namespace.before, "dnsmasq", *options]
    with run_daemon("dnsmasq", command, directory / "dnsmasq.log", os.environ) as daemon:
        daemon.wait_until(lambda: host.namespace.call(lambda: accepts(PORT, host.address)), START_S)
        yield NameServer(host, hosts, daemon)
