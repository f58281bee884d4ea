"""`trimsfs doctor` for a mount of a fleet: certificates, members and clocks."""

import datetime
import email.utils
import os
import pwd
import re
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.services import HOST
from tests.support.certificates import Authority, Identity
from tests.support.http_server import Server
from trimsfs.cli.diagnosis.checks import Advice, ProblemError
from trimsfs.errors import ConfigurationError
from trimsfs.extras.fleet import member_checks
from trimsfs.extras.fleet.fleet_plugin import FleetPlugin
from trimsfs.handover.ledger import Ledger
from trimsfs.options import FLEET_SOCKET, MountOptions


def options(authority: Authority, identity: Identity, members: str = "10.0.0.1:7443", port: int = 7443) -> MountOptions:
    return MountOptions(
        fleet="models",
        fleet_members=members,
        fleet_listen=f"{HOST}:{port}",
        fleet_ca=authority.certificate,
        fleet_cert=identity.certificate,
        fleet_key=identity.key,
    )


@contextmanager
def answering(authority: Authority, identity: Identity, status: int, ahead_s: float = 0.0) -> Iterator[int]:
    """A member whose nginx answers a status; its port."""

    def answer(_request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead_s)
        return status, {"Date": email.utils.format_datetime(now, usegmt=True)}, b""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    context.load_verify_locations(authority.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    with Server(answer, context).running() as server:
        yield urlsplit(server.url).port or 0


def refusal(authority: Authority, identity: Identity) -> str:
    """Why the certificate is refused."""
    with pytest.raises(ConfigurationError) as caught:
        member_checks.certificate(options(authority, identity))
    return str(caught.value)


def test_a_certificate_that_members_would_refuse_fails_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    authority, stranger = Authority(tmp_path), Authority(tmp_path / "other").identity(HOST)
    told = f"option fleet_cert {stranger.certificate}: unable to get local issuer certificate: issue one by the CA"
    assert refusal(authority, stranger).startswith(told)
    assert "KEY_VALUES_MISMATCH: it must belong to" in refusal(
        authority, Identity(authority.identity(HOST).certificate, stranger.key)
    )
    told = refusal(authority, authority.identity(HOST, usages=[ExtendedKeyUsageOID.SERVER_AUTH]))
    assert told.endswith("certificate purpose: issue one with extendedKeyUsage = serverAuth, clientAuth")
    told = refusal(authority, authority.identity(HOST, days=-1))
    assert "certificate has expired: renew it, or the CA's, then `mountctl fleet apply`" in told


@pytest.mark.parametrize("option", ["ca", "cert", "key"])
def test_a_file_that_is_missing_or_junk_is_named(tmp_path: Path, option: str) -> None:
    authority = Authority(tmp_path)
    identity = authority.identity(HOST)
    file = {"ca": authority.certificate, "cert": identity.certificate, "key": identity.key}[option]
    file.write_text("junk")
    assert f"{file}" in refusal(authority, identity)
    assert ("fleet_ca" in refusal(authority, identity)) == (option == "ca")
    file.unlink()
    assert refusal(authority, identity) == f"option fleet_{option} {file}: No such file or directory"


def test_a_certificate_that_expires_soon_and_a_key_that_all_may_read_are_noted(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with pytest.raises(Advice, match="expires in 1 days: renew it"):
        member_checks.certificate(options(authority, authority.identity(HOST)))
    identity = authority.identity(HOST, days=30)
    identity.key.chmod(0o644)
    with pytest.raises(Advice, match="every local user may read it: `chmod 600 "):
        member_checks.certificate(options(authority, identity))
    identity.key.chmod(0o600)
    assert "valid for 30 days" in member_checks.certificate(options(authority, identity))


def checked(directory: Path, own: int, *others: tuple[int, float]) -> str:
    """The check of the members, of which each has a status and a clock; this host is the first."""
    authority = Authority(directory)
    identity = authority.identity(HOST)
    with ExitStack() as stack:
        ports = [stack.enter_context(answering(authority, identity, *each)) for each in ((own, 0.0), *others)]
        listed = ",".join(f"{HOST}:{port}" for port in ports)
        return member_checks.members(options(authority, identity, listed, ports[0]))


@pytest.mark.parametrize(
    ("own", "others", "error", "told"),
    [
        (400, [(400, 0.0)], None, "all 2 answer, their clocks within [0-9]+ s of this host's$"),
        (400, [(403, 0.0)], Advice, f"1 of 2 do not serve this host: {HOST}:.*refuses this host's certificate"),
        (400, [(404, 0.0)], Advice, f"1 of 2 do not serve this host: {HOST}:.*serves another fleet"),
        (400, [(502, 0.0)], Advice, "its nginx runs, but no trimsfs server behind it"),
        (400, [(500, 0.0)], Advice, "answers 500"),
        (403, [], ProblemError, "this host: .*refuses this host's certificate"),
        (502, [], ProblemError, "this host: .*its nginx runs, but no trimsfs server behind it"),
        (503, [(400, 0.0)], Advice, f"1 of 2 .*{HOST}:.*is drained, or off: `mountctl fleet undrain` or"),
        (400, [(503, 0.0)], Advice, f"1 of 2 .*{HOST}:.*is drained, or off: `mountctl fleet undrain` or"),
        (400, [(400, 100.0)], ProblemError, r"its clock differs by [+]1?\d\d s: set both by NTP"),
    ],
)
def test_a_member_that_does_not_serve_or_tells_another_time_is_named(
    tmp_path: Path, own: int, others: list[tuple[int, float]], error: type[Exception] | None, told: str
) -> None:
    if error is None:
        assert re.match(told, checked(tmp_path, own, *others))
    else:
        with pytest.raises(error, match=told):
            checked(tmp_path, own, *others)


@pytest.mark.parametrize(
    ("listed", "told"),
    [("127.0.0.2:1", "lacks this host: add it"), ("/nonexistent/list", "No such file or directory: correct it")],
)
def test_a_list_without_this_host_fails(tmp_path: Path, listed: str, told: str) -> None:
    authority = Authority(tmp_path)
    with pytest.raises(ProblemError, match=f"option fleet_members {listed}: {told}"):
        member_checks.members(options(authority, authority.identity(HOST), listed))


def test_all_members_that_do_not_serve_are_named_with_what_to_do(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    identity = authority.identity(HOST)
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    with (
        answering(authority, identity, 400) as own,
        answering(stranger, stranger.identity(HOST), 400) as other,
        answering(authority, identity, 404) as one,
        answering(authority, identity, 404) as two,
    ):
        listed = ",".join(f"{HOST}:{port}" for port in (own, other, one, two, 1))
        with pytest.raises(Advice) as caught:
            member_checks.members(options(authority, identity, listed, own))
    prefix, *told = str(caught.value).replace("host: ", "host; ", 1).split("; ")
    assert prefix == "4 of 5 do not serve this host"
    together = ", ".join(sorted(f"{HOST}:{port}" for port in (one, two)))
    assert sorted(told) == sorted(
        [
            f"{HOST}:{other}: this host refuses its certificate: self-signed certificate in certificate chain: "
            "`trimsfs doctor` there",
            f"{together}: serves another fleet: compare the option fleet",
            f"{HOST}:1: Connection refused: `systemctl status trimsfs-nginx` there",
        ]
    )


def checked_rights(cache: Path, user: str, monkeypatch: pytest.MonkeyPatch, worker: str) -> str:
    """The check of nginx, whose workers are this user."""
    monkeypatch.setattr(member_checks, "FLEET_USER", worker)
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/sbin/nginx")
    return member_checks.nginx(MountOptions(server_user=user, cache_dir=cache))


def test_nginx_needs_users_and_the_rights_of_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    with pytest.raises(ProblemError, match="uid 4000000, has no name, as nginx needs: run `useradd --system trimsfs`"):
        checked_rights(tmp_path, "4000000", monkeypatch, "nobody")
    with pytest.raises(Advice, match=f"its workers run as {me}, who may write to the cache: run `useradd --system no-"):
        checked_rights(tmp_path, me, monkeypatch, "no-such-user")
    socket = tmp_path / FLEET_SOCKET
    socket.touch()
    for mode, fails in ((0o660, False), (0o600, True)):
        socket.chmod(mode)
        told = pytest.raises(ProblemError, match=r"may not write to it.*`mountctl upgrade NAME`")
        with told if fails else nullcontext():
            assert checked_rights(tmp_path, me, monkeypatch, "nobody") == "is installed, its workers run as nobody"
    socket.chmod(0o660)
    with pytest.raises(ProblemError, match=f"the server runs as uid {os.getuid()}: `mountctl upgrade NAME`"):
        checked_rights(tmp_path, "nobody", monkeypatch, "nobody")


@pytest.mark.parametrize(
    ("stores", "told"),
    [
        ({"store": "/srv/models"}, ["/srv/models"]),
        ({"store": "file:///srv/models"}, ["file:///srv/models"]),
        ({"stores": [{"path": "a", "store": "s3://a"}, {"path": "b", "store": "/b"}]}, ["/b"]),
        ({"store": "s3://models/prefix"}, []),
    ],
)
def test_a_store_that_is_a_directory_is_noted(
    stores: dict[str, Any], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = {name: f"/{name}" for name in ("fleet_members", "fleet_ca", "fleet_cert", "fleet_key")}
    of_mount = MountOptions(fleet="models", fleet_listen=f"{HOST}:7443", **fleet, **stores)
    with pytest.raises(Advice, match=f"^{told[0]}: a directory, ") if told else nullcontext():
        assert member_checks.stores(of_mount) == "none is a directory"
    parts: Any = SimpleNamespace(copier=None, disk=SimpleNamespace(space=None), ledger=Ledger())
    assert FleetPlugin(of_mount, alone=True).peers(of_mount, parts, parts, parts) is not None
    assert [record.getMessage().partition(":")[2].split()[1] for record in caplog.records] == told
    caplog.clear()
