"""The exporter's processes: the scraper, and the web server, which has no privileges."""

import errno
import logging
import os
import select
import signal
import socket
import stat
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from setproctitle import setproctitle

from trimsfs.errors import ConfigurationError
from trimsfs.extras.exporter.history import INTERVAL_S
from trimsfs.extras.exporter.mounts import Mounts, ScraperGoneError
from trimsfs.extras.exporter.scraper import Scraper, scrape_forever
from trimsfs.extras.exporter.web import NAME, STAY, WebServer
from trimsfs.listen_address import ListenAddress
from trimsfs.mountinfo import file_systems
from trimsfs.options import default_user
from trimsfs.server.sandbox import CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, Identity, become, fence, identity, keep_only
from trimsfs.text import TITLE_PREFIX

log = logging.getLogger(__name__)

LINGER_S, START_S = 5.0, 60.0
"""How long an exporter that ends with the last mount waits for the next one; for the first one."""
BIND_ATTEMPTS, BIND_INTERVAL_S = 50, 0.1
PROBE_TIMEOUT_S = 5.0
SHORTEST_TOKEN = 16


def read_token(file: Path) -> str:
    """The token in a file: its first line. Raises ConfigurationError."""
    try:
        token = file.read_text().partition("\n")[0].strip()
        others = stat.S_IMODE(file.stat().st_mode) & stat.S_IROTH
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ConfigurationError(f"option --token-file {file}: {reason}") from None
    if others:
        raise ConfigurationError(f"option --token-file {file}: all users can read it: `chmod o-r {file}`")
    if len(token) < SHORTEST_TOKEN or not token.isascii():
        remedy = f"`openssl rand -hex 32 > {file}`"
        raise ConfigurationError(f"option --token-file {file}: needs {SHORTEST_TOKEN} ASCII characters: {remedy}")
    return token


def listen(address: ListenAddress, *, shared: bool = False) -> socket.socket | None:
    """A socket that listens at an address. Raises ConfigurationError.

    *shared*: None where an exporter that ends with the last mount listens already; it has been asked to stay.
    """
    for _ in range(BIND_ATTEMPTS):
        try:
            return _bound(address)
        except FileNotFoundError as error:
            raise ConfigurationError(f"--listen {address}: {error.strerror}: create its directory") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigurationError(f"--listen {address}: {error.strerror}: choose another address") from None
        if not shared:
            break
        answer = _probe(address)
        if answer is not None:
            if answer == NAME:
                return None
            break
        time.sleep(BIND_INTERVAL_S)  # it is ending
    raise ConfigurationError(f"--listen {address}: another program listens there: end it, or choose another address")


def _bound(address: ListenAddress) -> socket.socket:
    if address.path is not None:
        _remove_dead(address.path)
    listener = socket.socket(_family(address))
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(_place(address))
        if address.path is not None:
            # Everybody may ask root's exporter, as a port would let everybody; it tells without a token what they may
            # see anyway.
            address.path.chmod(0o666 if os.geteuid() == 0 else 0o600)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _family(address: ListenAddress) -> socket.AddressFamily:
    if address.path is not None:
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def _place(address: ListenAddress) -> str | tuple[str, int]:
    return str(address.path) if address.path is not None else (address.host, address.port)


def _remove_dead(path: Path) -> None:
    """Remove the socket that an exporter has left which has ended, and make the directory of root's.

    Raises ConfigurationError for another file.
    """
    if os.geteuid() == 0:
        path.parent.mkdir(mode=0o755, exist_ok=True)
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ConfigurationError(f"--listen unix:{path}: this file is no socket: choose another address")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # one that hangs may have no room for another connection
        if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
            path.unlink()


def _probe(address: ListenAddress) -> str | None:
    """Ask who listens at an address to stay; its name, or None if it ends meanwhile."""
    connection = HTTPConnection("localhost", timeout=PROBE_TIMEOUT_S)
    try:
        with socket.socket(_family(address)) as one:
            one.settimeout(PROBE_TIMEOUT_S)
            one.connect(_place(address))
            connection.sock = one
            connection.request("GET", STAY)
            return connection.getresponse().getheader("Server") or ""
    except (ConnectionError, FileNotFoundError):
        return None
    except (OSError, HTTPException):
        return ""


def run(listener: socket.socket, token: str | None, *, timeout_s: float, while_mounted: bool) -> None:
    """Serve until a signal comes or, *while_mounted*, some seconds after the last mount is gone.

    Root's exporter becomes an unprivileged user. Only with a *token*, root's scraper stays root: it then sees what
    mounts tell of tenants and models, and who has files open. Raises ConfigurationError.
    """
    root = os.geteuid() == 0
    whole = root and token is not None
    user = identity(default_user()) if root else None
    ours, others = Pipe()
    if os.fork() == 0:
        _scrape(others, (ours, listener), Scraper(timeout_s), None if whole else user, root=root)
    others.close()
    setproctitle(f"{TITLE_PREFIX}exporter")
    if user is not None:
        become(user)
    fence(())
    mounts = Mounts(ours, whole=whole, timeout_s=timeout_s)
    server = WebServer(listener, mounts, token)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        _sample(mounts, server, ours, while_mounted=while_mounted)
    except ScraperGoneError:
        log.error("the scraper has ended or does not answer, and the exporter ends with it: start it again")
        sys.exit(1)


def _scrape(
    connection: Connection,
    not_mine: tuple[Connection, socket.socket],
    scraper: Scraper,
    user: Identity | None,
    *,
    root: bool,
) -> None:
    """Be the scraper, in a process of its own: as a *user*, or with what root needs to look at processes."""
    try:
        for each in not_mine:
            each.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it ends with the web server
        setproctitle(f"{TITLE_PREFIX}scraper")
        if user is not None:
            become(user)
        elif root:
            keep_only(CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH)
        if user is not None or not root:
            fence(())  # which would keep it from looking at the processes of others
        scrape_forever(connection, scraper)
    finally:
        os._exit(0)


def _sample(mounts: Mounts, server: WebServer, scraper: Connection, *, while_mounted: bool) -> None:
    """Take samples for the plots. Returns when the exporter is not needed any more. Raises ScraperGoneError."""
    changes = select.poll()
    changes.register(scraper, 0)  # poll reports its end in any case
    with Path("/proc/self/mountinfo").open() as table:
        changes.register(table, select.POLLERR | select.POLLPRI)
        patience_s, sampled, mounted = START_S, 0.0, time.monotonic()
        while True:
            now = time.monotonic()
            if now - sampled >= INTERVAL_S:
                mounts.sample()
                sampled = now
            if file_systems():
                patience_s, mounted = LINGER_S, now
            elif while_mounted and now - max(mounted, server.asked_to_stay) > patience_s:
                server.shutdown()
                return
            left_s = INTERVAL_S if mounted == now else 1.0
            events = changes.poll(1000 * min(left_s, max(0.1, sampled + INTERVAL_S - now)))
            if any(descriptor == scraper.fileno() for descriptor, _ in events):
                raise ScraperGoneError
