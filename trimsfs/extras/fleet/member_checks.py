"""The checks of ``trimsfs doctor`` for a mount of a fleet: stores, certificate, nginx, members and clocks."""

import email.utils
import http.client
import math
import pwd
import shutil
import ssl
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from trimsfs.cli.diagnosis.checks import Advice, ProblemError
from trimsfs.extras.fleet.certificates import check_certificate, client_context, files_of
from trimsfs.extras.fleet.connection import reason_of
from trimsfs.extras.fleet.members import Members
from trimsfs.listen_address import parse_address
from trimsfs.options import FLEET_SOCKET, FLEET_USER, FLEET_USERS_REMEDY, MountOptions, directories
from trimsfs.server.sandbox import Identity, identity

ANSWER_TIMEOUT_S = 3.0
RESOLVING_S = 30.0
"""How long names of members are looked up."""
CLOCK_DIFFERENCE_S = 30.0
"""More than this, and certificates are not valid yet, or stores refuse signatures, sooner or later."""
RENEW_BEFORE_S = 14 * 86400.0
ASKED_AT_ONCE = 32
SOCKET_RIGHTS = stat.S_IRGRP | stat.S_IWGRP
NOT_A_REQUEST, AWAY = 400, 503
"""What a member answers that serves this host, as no chunk is asked for, and one that is drained or off."""
_PROBLEMS = {
    403: "refuses this host's certificate: see `fleet certificate` above, else compare the files of fleet_ca",
    404: "serves another fleet: compare the option fleet",
    502: "its nginx runs, but no trimsfs server behind it: `trimsfs status` there",
    AWAY: "is drained, or off: `mountctl fleet undrain` or `trimsfs fleet on` there",
}
"""What is wrong with a member, by the status that its nginx answers."""


def certificate(options: MountOptions) -> str:
    """Have this host's certificate accepted as other members would: as a server's, and as a client's."""
    _, chain, key = files = files_of(options)
    left_s = check_certificate(*files)
    if left_s < RENEW_BEFORE_S:
        raise Advice(f"{chain}: expires in {left_s / 86400:.0f} days: renew it")
    if key.stat().st_mode & stat.S_IROTH:
        raise Advice(f"{key}: every local user may read it: `chmod 600 {key}`")
    return f"{chain}: valid for {left_s / 86400:.0f} days"


def stores(options: MountOptions) -> str:
    """Whether files have the same ETags on all hosts, which share by these."""
    if paths := directories(options):
        raise Advice(
            f"{', '.join(paths)}: a directory, of which hosts with other device and inode numbers there share nothing: "
            "use a bucket"
        )
    return "none is a directory"


def nginx(options: MountOptions) -> str:
    """Whether nginx is installed, and may do what it needs to: other hosts get nothing from this one otherwise."""
    if shutil.which("nginx") is None and shutil.which("nginx", path="/usr/sbin") is None:
        raise ProblemError("not installed, so this host sends nothing to others: install the package nginx-light")
    return "is installed" if options.server_user is None else _rights(identity(options.server_user), options)


def _rights(server: Identity, options: MountOptions) -> str:
    """Check that nginx's workers may ask the *server*, and write nothing."""
    if not _exists(server.uid):
        raise ProblemError(f"the server's user, {server.name}, has no name, as nginx needs: {FLEET_USERS_REMEDY}")
    assert options.cache_dir is not None
    with suppress(FileNotFoundError):  # the mount creates it
        socket = options.cache_dir / FLEET_SOCKET
        status = socket.stat()
        if status.st_gid != server.gid or status.st_mode & SOCKET_RIGHTS != SOCKET_RIGHTS:
            raise ProblemError(
                f"{socket}: group {server.gid}, of nginx's workers, may not write to it: the server runs as "
                f"uid {status.st_uid}: `mountctl upgrade NAME`"
            )
    if not _exists(FLEET_USER):
        raise Advice(
            f"its workers run as {server.name}, who may write to the cache: run `useradd --system {FLEET_USER}`, "
            "then `mountctl fleet apply`"
        )
    return f"is installed, its workers run as {FLEET_USER}"


def _exists(user: int | str) -> bool:
    try:
        pwd.getpwuid(user) if isinstance(user, int) else pwd.getpwnam(user)
    except KeyError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Heard:
    """What a member has answered: why it does not serve this host, and by how much its clock is ahead."""

    member: str
    problem: str | None
    ahead_s: float = 0.0


def members(options: MountOptions) -> str:
    """Ask every member whether it serves this host, and what time it is there."""
    assert options.fleet is not None
    assert options.fleet_members is not None
    assert options.fleet_listen is not None
    listed = Members(options.fleet_members, parse_address(options.fleet_listen))
    try:
        addresses, mine = listed.read(resolving_s=RESOLVING_S)
    except ValueError as error:
        raise ProblemError(f"option fleet_members {options.fleet_members}: {error}: correct it") from None
    context = client_context(*files_of(options))
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        heard = list(threads.map(partial(_ask, fleet=options.fleet, context=context), sorted(addresses)))
    own = next((each for each in heard if each.member in mine), None)
    if own is None:
        raise ProblemError(f"option fleet_members {options.fleet_members}: lacks this host: add it")
    if own.problem not in {None, _PROBLEMS[AWAY]}:  # that is intended
        raise ProblemError(f"{own.member}, this host: {own.problem}")
    wrong = [each for each in heard if each.problem is None and abs(each.ahead_s) > CLOCK_DIFFERENCE_S]
    if wrong:
        raise ProblemError(f"{wrong[0].member}: its clock differs by {wrong[0].ahead_s:+.0f} s: set both by NTP")
    failing: dict[str, list[str]] = {}
    for each in heard:
        if each.problem is not None:
            failing.setdefault(each.problem, []).append(each.member)
    if failing:
        problems = "; ".join(f"{', '.join(those)}: {problem}" for problem, those in failing.items())
        raise Advice(f"{sum(map(len, failing.values()))} of {len(heard)} do not serve this host: {problems}")
    apart_s = max(abs(each.ahead_s) for each in heard)
    return f"all {len(heard)} answer, their clocks within {math.ceil(apart_s)} s of this host's"


def _ask(member: str, *, fleet: str, context: ssl.SSLContext) -> _Heard:
    host, _, port = member.rpartition(":")
    connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=ANSWER_TIMEOUT_S, context=context)
    try:
        connection.request("GET", f"/c/{fleet}/")
        answer = connection.getresponse()
        date = answer.getheader("date")
        ahead_s = 0.0 if date is None else email.utils.parsedate_to_datetime(date).timestamp() - time.time()
        known = None if answer.status == NOT_A_REQUEST else f"answers {answer.status}: see its log"
        return _Heard(member, _PROBLEMS.get(answer.status, known), ahead_s)
    except ssl.SSLCertVerificationError as error:
        return _Heard(member, f"{reason_of(error)}: `trimsfs doctor` there")
    except TimeoutError as error:
        return _Heard(member, f"{reason_of(error)}: `systemctl status trimsfs-nginx` and `trimsfs status` there")
    except OSError as error:
        return _Heard(member, f"{reason_of(error)}: `systemctl status trimsfs-nginx` there")
    except (http.client.HTTPException, ValueError) as error:
        return _Heard(member, f"{error or type(error).__name__}: is that trimsfs-nginx?")
    finally:
        connection.close()
