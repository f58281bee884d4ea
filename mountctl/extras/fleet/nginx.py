"""The configuration of nginx for the mounts of this host that belong to fleets: written, checked and reloaded."""

import errno
import fcntl
import grp
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template

from trimsfs.errors import CommandNotFoundError, CommandNotRunnableError, ConfigurationError
from trimsfs.listen_address import parse_address
from trimsfs.options import FLEET_REPORTS, FLEET_SOCKET, FLEET_USER, FLEET_USERS_REMEDY, MountOptions

WORKERS = 4
RELOAD_S, RELOAD_INTERVAL_S = 30.0, 0.02
"""How long nginx may take to check and to load its configuration, and how often `Nginx.reload` looks."""
TURN_S, TURN_INTERVAL_S = 2 * RELOAD_S + 5, 0.1
"""How long a command waits for another one, which may check and load a configuration, and how often it looks."""
_LONGEST_SOCKET = 107
"""Bytes that the path of a Unix socket may have."""
_QUOTABLE = re.compile(r"[^\"$\\\n]*")
_TRIED_AGAIN = re.compile(r"bind\(\) .*\(98: ")
"""What nginx says before it tries some more times: something listens there."""
_DRAINED = "add_header Retry-After 10 always; return 503;"
"""As `trimsfs.extras.fleet.protocol` has it: others leave this host alone for a while."""
_SERVING = """limit_except GET {
                deny all;
            }
            proxy_pass http://$upstream;
            proxy_http_version 1.1;
            proxy_pass_request_body off;
            proxy_set_header Connection "";
            proxy_set_header Content-Length "";
            proxy_read_timeout 120s;
            proxy_next_upstream off;"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A mount of this host that belongs to a fleet. *options* are resolved. A ``drained`` one sends nothing."""

    mountpoint: Path
    options: MountOptions
    drained: bool = False


class Nginx:
    """The nginx of this host's fleets, whose files are in a *directory*."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configuration = directory / "nginx.conf"
        self._drained = directory / "drained"
        self._errors = directory / "errors.log"

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Have other commands wait before they change its files, or have it load them.

        Raises CommandNotRunnableError if another command takes longer than it should.
        """
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        deadline = time.monotonic() + TURN_S
        try:
            while not _locked(descriptor):
                if time.monotonic() > deadline:
                    pid = _holder(descriptor)
                    raise CommandNotRunnableError(
                        f"{self.directory} is locked by `mountctl fleet`, pid {pid}: run `kill -CONT {pid}`, or end it"
                    )
                time.sleep(TURN_INTERVAL_S)
            yield
        finally:
            os.close(descriptor)

    def drained(self) -> set[str]:
        """The mount points that an operator has drained."""
        try:
            return set(self._drained.read_text().splitlines())
        except FileNotFoundError:
            return set()

    def set_drained(self, mountpoints: Iterable[Path], *, drained: bool) -> None:
        """Drain mounts, or serve them again, from the next `write` on."""
        chosen = {str(mountpoint) for mountpoint in mountpoints}
        all_drained = self.drained() | chosen if drained else self.drained() - chosen
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = self._drained.with_suffix(".new")
        with new.open("w") as file:
            file.writelines(f"{mountpoint}\n" for mountpoint in sorted(all_drained))
            file.flush()
            os.fsync(file.fileno())  # before it replaces the old one, also if the power fails
        new.replace(self._drained)

    def write(self, members: Sequence[Member]) -> None:
        """Write the configuration of some mounts, if nginx accepts it. Raises TrimsError and OSError."""
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = self.configuration.with_suffix(".new")
        text = render(self.directory, members)
        _check_certificates(members)
        new.write_text(text)
        try:
            done = subprocess.run(
                [*_program(), "-t", "-q", "-c", new],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=RELOAD_S,
                start_new_session=True,  # without a terminal: a key that has a passphrase is refused
            )
            if done.returncode != 0:
                said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
                reason = _plain(next((line for line in said if "[emerg]" in line), said[0]))
                if reason.startswith("bind() "):  # perhaps later: the service is started again
                    raise CommandNotRunnableError(f"nginx cannot listen: {reason}: see `ip address` and fleet_listen")
                raise ConfigurationError(f"nginx refuses its configuration: {reason}")
            new.replace(self.configuration)
        except subprocess.TimeoutExpired:
            raise CommandNotRunnableError(f"nginx does not check {new} within {RELOAD_S:.0f} s") from None
        finally:
            new.unlink(missing_ok=True)

    def check_stopped(self) -> None:
        """Raise CommandNotRunnableError if nginx runs; forget what an earlier one has said."""
        if (pid := self.running()) is not None:
            raise CommandNotRunnableError(f"nginx runs already, as process {pid}: `mountctl fleet apply` reloads it")
        self._errors.unlink(missing_ok=True)

    def check_ports(self, members: Iterable[Member], *, available: bool = True) -> None:
        """Raise CommandNotRunnableError if others listen where nginx should, or if it cannot listen there for another
        reason, unless the address need not be *available* yet.

        The others may be workers of an nginx that was killed: they serve on by its configuration.
        """
        for member in members:
            address = parse_address(str(member.options.fleet_listen))
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            try:
                socket.create_server((address.host, address.port), family=family).close()
            except OSError as error:
                if error.errno != errno.EADDRINUSE and not available:
                    continue
                reason = os.strerror(error.errno or 0)
                remedy = "end what `ss -ltnp` shows there, as workers of a killed nginx, or change fleet_listen"
                raise CommandNotRunnableError(f"nginx cannot listen: {address}: {reason}: {remedy}") from None

    def command(self) -> list[str]:
        """The command that runs nginx in the foreground. Raises CommandNotFoundError."""
        return [*_program(), "-c", str(self.configuration), "-g", "daemon off;"]

    def running(self) -> int | None:
        """The process of the nginx that runs, if one does."""
        with suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pid = int((self.directory / "nginx.pid").read_text())
            if str(self.configuration).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def reload(self) -> bool:
        """Have the running nginx serve by its configuration; False if none runs. Requests under way are finished.

        Raises CommandNotRunnableError if nginx keeps the configuration that it has.
        """
        pid = self.running()
        if pid is None:
            return False
        deadline = time.monotonic() + RELOAD_S
        while not (before := _workers(pid)) and time.monotonic() < deadline:  # it has just been started
            time.sleep(RELOAD_INTERVAL_S)
        offset = self._errors.stat().st_size if self._errors.exists() else 0
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)
        reason = f"it has not loaded another in {RELOAD_S:.0f} s"
        while time.monotonic() < deadline and self.running() == pid:
            now, said = _workers(pid), self._said(offset)
            if now and now.isdisjoint(before):
                return True
            if said:
                reason = said[0]
                if not _TRIED_AGAIN.match(said[-1]):
                    break
            time.sleep(RELOAD_INTERVAL_S)
        if self.running() != pid:
            raise CommandNotRunnableError("nginx has ended meanwhile: `journalctl -u trimsfs-nginx`")
        raise CommandNotRunnableError(
            f"nginx keeps its old configuration: {reason}: see `ss -ltnp`; "
            "if nginx itself listens there, `systemctl restart trimsfs-nginx`"
        )

    def _said(self, offset: int) -> list[str]:
        """Why nginx has refused configurations, line by line, after the first *offset* bytes."""
        try:
            with self._errors.open(errors="replace") as file:
                file.seek(offset)
                return [_plain(line) for line in file.read().splitlines()]
        except FileNotFoundError:
            return []


def render(directory: Path, members: Sequence[Member]) -> str:
    """The text of the configuration. Raises ConfigurationError."""
    listens = [member.options.fleet_listen for member in members]
    for member in members:
        if listens.count(member.options.fleet_listen) > 1:
            raise ConfigurationError(
                f"option fleet_listen {member.options.fleet_listen}: another mount listens there: choose another port"
            )
    users = {member.options.server_user: _user(member.options) for member in members}
    if len(set(users.values())) > 1:
        raise ConfigurationError(
            f"option --server-user: the mounts of fleets have several, {', '.join(sorted(map(str, users)))}: "
            "give them one, whose group lets nginx read"
        )
    return _template("nginx.conf").substitute(
        user=next(iter(users.values()), ""),
        workers=min(WORKERS, os.cpu_count() or 1),
        directory=_quotable(directory),
        members="".join(_member(number, member) for number, member in enumerate(members)),
    )


def _check_certificates(members: Iterable[Member]) -> None:
    """Raise CommandNotRunnableError if a file is missing, perhaps until later: the service is started again."""
    for member in members:
        options = member.options
        for name, file in (("ca", options.fleet_ca), ("cert", options.fleet_cert), ("key", options.fleet_key)):
            if not os.path.exists(str(file)):
                raise CommandNotRunnableError(
                    f"option fleet_{name} {file} of {member.mountpoint}: there is no such file: make it"
                )


def _member(number: int, member: Member) -> str:
    options, upstream = member.options, f"trimsfs_{number}"
    assert options.cache_dir is not None
    socket, reports = options.cache_dir / FLEET_SOCKET, options.cache_dir / FLEET_REPORTS
    if len(bytes(reports)) > _LONGEST_SOCKET:
        raise ConfigurationError(f"option --cache-dir {options.cache_dir}: too long for a fleet's socket: shorten it")
    serve = _DRAINED if member.drained else _SERVING
    return _template("member.conf").substitute(
        mountpoint=_quotable(member.mountpoint),
        upstream=upstream,
        socket=_quotable(socket),
        reports=_quotable(reports),
        listen=options.fleet_listen,
        certificate=_quotable(options.fleet_cert),
        key=_quotable(options.fleet_key),
        ca=_quotable(options.fleet_ca),
        fleet=options.fleet,
        serve=Template(serve).substitute(upstream=upstream),
        blobs=_quotable(options.cache_dir / "blobs"),
    )


def _template(name: str) -> Template:
    return Template(Path(__file__).with_name(name).read_text())


def _quotable(path: Path | None) -> str:
    """A path that nginx takes as it is between quotes. Raises ConfigurationError."""
    if _QUOTABLE.fullmatch(str(path)) is None:
        raise ConfigurationError(f"{str(path)!r}: nginx cannot use a path with quotes, dollars or backslashes")
    return str(path)


def _user(options: MountOptions) -> str:
    """The line that names the user and the group of nginx's workers; empty if nginx does not start as root."""
    if options.server_user is None:
        return ""
    name = options.server_user
    try:
        server = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        group = grp.getgrgid(server.pw_gid).gr_name
    except KeyError:
        raise ConfigurationError(
            f"option --server-user {name}: nginx needs a user with a name: {FLEET_USERS_REMEDY}"
        ) from None
    try:
        return f"user {pwd.getpwnam(FLEET_USER).pw_name} {group};"
    except KeyError:
        return f"user {server.pw_name} {group};"


def _program() -> list[str]:
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        raise CommandNotFoundError("nginx is not installed: install the package nginx-light")
    return [program, "-e", "stderr"]


def _workers(pid: int) -> set[int]:
    """The processes of an nginx that take new requests: not those that finish what they send."""
    workers = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{child}/cmdline").read_bytes().rstrip(b"\0") == b"nginx: worker process":
                    workers.add(int(child))
    return workers


def _plain(line: str) -> str:
    """A line of nginx without its time and level."""
    return re.sub(r"^.*?\[\w+\] (\d+#\d+: )?", "", line)


def _locked(directory: int) -> bool:
    """Lock a directory by its descriptor; whether that was possible."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(directory: int) -> str:
    """The process that has locked a directory, by the kernel's list of locks; ``?`` if it shows none."""
    inode = str(os.fstat(directory).st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        match line.split():
            case [_, "FLOCK", _, _, pid, place, *_] if place.rpartition(":")[2] == inode:
                return pid
    return "?"
