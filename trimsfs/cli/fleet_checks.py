"""The checks of ``trimsfs doctor`` for a mount that belongs to a fleet: certificate, nginx, members and clocks."""

import email.utils
import http.client
import shutil
import ssl
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trimsfs.cli.checks import Advice, ProblemError
from trimsfs.fleet.certificates import check_certificate, client_context
from trimsfs.fleet.members import Members
from trimsfs.listen_address import parse_address
from trimsfs.options import MountOptions

ANSWER_TIMEOUT_S = 3.0
CLOCK_DIFFERENCE_S = 30.0
"""More than this, and certificates are not valid yet, or stores refuse signatures, sooner or later."""
RENEW_BEFORE_S = 14 * 86400.0
ASKED_AT_ONCE = 32
AWAY = 503
_PROBLEMS = {
    403: "refuses this host's certificate: see `fleet certificate` above, else compare the files of --fleet-ca",
    404: "serves another fleet",
    502: "its nginx runs, but no trimsfs behind it",
    AWAY: "is drained, or off: `mountctl fleet undrain` or `trimsfs fleet on` there",
}
"""What is wrong with a member, by the status that its nginx answers."""


def certificate(options: MountOptions) -> str:
    """Have this host's certificate accepted as other members would: as a server's, and as a client's."""
    _, chain, key = files = _files(options)
    left_s = check_certificate(*files)
    if left_s < RENEW_BEFORE_S:
        raise Advice(f"{chain}: expires in {left_s / 86400:.0f} days: renew it")
    if key.stat().st_mode & stat.S_IROTH:
        raise Advice(f"{key}: every local user may read it: `chmod 600 {key}`")
    return f"{chain}: valid for {left_s / 86400:.0f} days"


def _files(options: MountOptions) -> tuple[Path, Path, Path]:
    """The CA's certificate, this host's, and its key."""
    assert options.fleet_ca is not None
    assert options.fleet_cert is not None
    assert options.fleet_key is not None
    return options.fleet_ca, options.fleet_cert, options.fleet_key


def nginx(_: MountOptions) -> str:
    """Whether nginx is installed: other hosts get nothing from this one without it."""
    if shutil.which("nginx") is None and shutil.which("nginx", path="/usr/sbin") is None:
        raise ProblemError("not installed, so this host sends nothing to others: install the package nginx-light")
    return "is installed"


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
        addresses, mine = listed.read()
    except (OSError, ValueError) as error:
        raise ProblemError(f"{options.fleet_members}: {error}: set --fleet-members") from None
    context = client_context(*_files(options))
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        heard = list(threads.map(partial(_ask, fleet=options.fleet, context=context), sorted(addresses)))
    own = next((each for each in heard if each.member in mine), None)
    if own is None:
        raise ProblemError(f"{options.fleet_members}: this host is not among {len(addresses)} members: add it")
    if own.problem not in {None, _PROBLEMS[AWAY]}:  # that is intended
        told = f"{own.member}, this host: {own.problem}"
        raise ProblemError(f"{told}: `systemctl status trimsfs-nginx` and `trimsfs status`")
    wrong = [each for each in heard if each.problem is None and abs(each.ahead_s) > CLOCK_DIFFERENCE_S]
    if wrong:
        raise ProblemError(f"{wrong[0].member}: its clock differs by {wrong[0].ahead_s:+.0f} s: set both by NTP")
    failing = [each for each in heard if each.problem is not None]
    if failing:
        raise Advice(f"{len(failing)} of {len(heard)} do not answer: {failing[0].member}: {failing[0].problem}")
    return f"all {len(heard)} answer"


def _ask(member: str, *, fleet: str, context: ssl.SSLContext) -> _Heard:
    host, _, port = member.rpartition(":")
    connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=ANSWER_TIMEOUT_S, context=context)
    try:
        connection.request("GET", f"/c/{fleet}/")
        answer = connection.getresponse()
        told = answer.getheader("date")
        ahead_s = 0.0 if told is None else email.utils.parsedate_to_datetime(told).timestamp() - time.time()
        return _Heard(member, _PROBLEMS.get(answer.status), ahead_s)
    except ssl.SSLCertVerificationError as error:
        return _Heard(member, f"its certificate: {error.verify_message}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return _Heard(member, str(error) or type(error).__name__)
    finally:
        connection.close()
