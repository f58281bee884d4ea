"""`mountctl fleet`: the configuration that it writes for nginx, and what it refuses."""

import configparser
import os
import pwd
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from mountctl.extras.fleet.nginx import Member, Nginx, render
from tests.services import accepts, reserved_ports, run_daemon
from tests.support.certificates import Authority
from tests.support.mounts import MOUNTCTL
from trimsfs.errors import ConfigurationError
from trimsfs.extras.fleet.member_checks import certificate
from trimsfs.options import FLEET_USERS_REMEDY, MountOptions, load_options

DIRECTORY = Path("/var/lib/trimsfs/fleet")
UNIT = Path(__file__).parents[2] / "packaging/systemd/trimsfs-nginx.service"


def member(**options: Any) -> Member:
    given: dict[str, Any] = {
        "fleet": "models",
        "fleet_members": "10.0.0.1:7443",
        "fleet_listen": "10.0.0.1:7443",
        "fleet_ca": "/etc/trimsfs/ca.pem",
        "fleet_cert": "/etc/trimsfs/fleet.pem",
        "fleet_key": "/etc/trimsfs/fleet.key",
        "cache_dir": "/var/cache/trimsfs/models",
    }
    return Member(mountpoint=Path("/models"), options=MountOptions(**(given | options)))


def test_each_mount_has_a_server_of_its_own() -> None:
    text = render(DIRECTORY, [member(), member(fleet="other", fleet_listen="10.0.0.1:7444", cache_dir="/cache")])
    for line in (
        *(
            "listen 10.0.0.1:7443 ssl backlog=4096;",
            "location /c/models/ {",
            'alias "/var/cache/trimsfs/models/blobs/";',
        ),
        *("listen 10.0.0.1:7444 ssl backlog=4096;", "location /c/other/ {", 'server "unix:/cache/fleet.sock";'),
    ):
        assert text.count(line) == 1
    assert "user " not in text


def test_workers_have_the_group_of_the_server() -> None:
    assert "user nobody nogroup;" in render(DIRECTORY, [member(server_user="nobody")])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "option fleet_listen 10.0.0.1:7443: another mount listens there: choose another port"),
        (
            {"fleet_listen": "10.0.0.1:1", "server_user": "root"},
            "option --server-user: the mounts of fleets have several",
        ),
        ({"fleet_listen": "10.0.0.1:1", "cache_dir": "/a$b"}, "nginx cannot use a path with quotes, dollars"),
        ({"fleet_listen": "10.0.0.1:1", "cache_dir": "/" + 100 * "c"}, "too long for a fleet's socket: shorten it"),
        (
            {"fleet_listen": "10.0.0.1:1", "server_user": "4000000"},
            "a name: run `useradd --system trimsfs`",
        ),
    ],
)
def test_what_nginx_cannot_have_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        render(DIRECTORY, [member(server_user="nobody"), member(**({"server_user": "nobody"} | options))])
    assert told in str(caught.value)


def test_the_users_that_a_host_lacks_are_those_of_the_packages() -> None:
    made = (UNIT.parents[2] / "packaging/systemd/sysusers.conf").read_text()
    assert set(re.findall(r"(?m)^u (\S+)", made)) == set(re.findall(r"useradd --system ([\w-]+)", FLEET_USERS_REMEDY))


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    """A directory that declares a mount of a fleet, and one of none."""
    authority = Authority(tmp_path)
    identity = authority.identity("127.0.0.1")
    (tmp_path / "mounts.d").mkdir()
    (tmp_path / "mounts.d/models.toml").write_text(
        f"""
        mountpoint = "/models"
        cache_dir = "{tmp_path}/cache"
        server_user = "{pwd.getpwuid(os.geteuid()).pw_name}"
        fleet = "models"
        fleet_members = "127.0.0.1:7443"
        fleet_listen = "127.0.0.1:7443"
        fleet_ca = "{authority.certificate}"
        fleet_cert = "{identity.certificate}"
        fleet_key = "{identity.key}"
        """
    )
    (tmp_path / "mounts.d/alone.toml").write_text('mountpoint = "/alone"\n')
    return tmp_path / "mounts.d"


def command(mounts: Path, *arguments: str) -> list[str]:
    directories = ["--mounts-dir", str(mounts), "--fleet-dir", str(mounts.parent / "fleet")]
    return [str(MOUNTCTL), "fleet", *arguments, *directories]


def mountctl_fleet(mounts: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(mounts, *arguments), capture_output=True, text=True, timeout=60, check=False)


def replace(mounts: Path, old: str, new: str) -> None:
    """Replace a text in the mount's declaration."""
    file = mounts / "models.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.fixture
def port(mounts: Path) -> Iterator[int]:
    """The port of the nginx of the mount that is declared, which runs."""
    with reserved_ports() as ports:
        port = ports[0]
    replace(mounts, 'fleet_listen = "127.0.0.1:7443"', f'fleet_listen = "127.0.0.1:{port}"')
    with run_daemon("nginx", command(mounts, "run"), mounts.parent / "nginx.log", os.environ) as daemon:
        daemon.wait_until(lambda: accepts(port), 20)
        daemon.wait_until(lambda: (mounts.parent / "fleet/nginx.pid").read_text() != "", 20)  # written after it listens
        yield port


def test_a_drained_mount_stays_so_until_it_is_undrained(mounts: Path) -> None:
    configuration = mounts.parent / "fleet/nginx.conf"
    not_running = "nginx does not run: `systemctl start trimsfs-nginx`\n"
    for action, state in (("apply", "served at 127.0.0.1:7443"), ("drain", "drained"), ("apply", "drained")):
        done = mountctl_fleet(mounts, action)
        assert (done.returncode, done.stdout) == (0, f"/models: fleet models: {state}\n{not_running}"), done.stderr
        assert ("return 503;" in configuration.read_text()) == (state == "drained")
    with (mounts.parent / "fleet/drained").open() as before:  # it is replaced in one step
        assert mountctl_fleet(mounts, "undrain", "models").returncode == 0
        assert before.read() == "/models\n"
    assert "return 503;" not in configuration.read_text()
    (mounts / "models.toml").unlink()
    done = mountctl_fleet(mounts, "apply")
    told = f"mountctl: no mount declared in {mounts} belongs to a fleet: set fleet in one\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_a_drain_of_a_mount_that_workers_of_a_killed_nginx_still_serve_is_no_success(mounts: Path, port: int) -> None:
    main = int((mounts.parent / "fleet/nginx.pid").read_text())
    workers = [int(pid) for pid in Path(f"/proc/{main}/task/{main}/children").read_text().split()]
    os.kill(main, signal.SIGKILL)
    try:
        done = mountctl_fleet(mounts, "drain")
        assert (done.returncode, done.stdout) == (126, "")
        told = f"mountctl: nginx cannot listen: 127.0.0.1:{port}: Address already in use: end what `ss -ltnp` shows"
        assert done.stderr.startswith(told)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def wrong(mounts: Path) -> None:
    """A mount that is declared with wrong options."""
    (mounts / "wrong.toml").write_text('mountpoint = "/wrong"\nfleet = "models"\n')


def test_a_mount_with_wrong_options_is_left_out_of_an_nginx_that_starts_or_reloads(
    mounts: Path, wrong: None, port: int
) -> None:
    told = "mountctl: /wrong is left out: option fleet models: incomplete: set fleet_members\n"
    done = mountctl_fleet(mounts, "apply")
    assert (done.returncode, done.stderr) == (2, told)
    assert done.stdout == f"/models: fleet models: served at 127.0.0.1:{port}\nreloaded nginx\n"


def test_a_mount_without_a_fleet_or_with_wrong_options_is_not_drained_alone(mounts: Path, wrong: None) -> None:
    for name, told in (
        ("wrong", "/wrong is left out: correct its options first"),
        ("alone", f"/alone belongs to no fleet: set fleet in its file in {mounts}"),
    ):
        done = mountctl_fleet(mounts, "drain", name)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"mountctl: {told}")
    assert mountctl_fleet(mounts, "drain").stdout.startswith("/models: fleet models: drained\n")
    assert (mounts.parent / "fleet/drained").read_text() == "/models\n/wrong\n"


def test_a_certificate_that_nginx_cannot_load_is_told(mounts: Path) -> None:
    (mounts.parent / "127.0.0.1.key").write_text("no key")
    done = mountctl_fleet(mounts, "apply")
    assert done.returncode == 2
    assert done.stderr.startswith("mountctl: nginx refuses its configuration: cannot load certificate key")
    assert not (mounts.parent / "fleet/nginx.conf").exists()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('listen = "127.0.0.1', 'listen = "192.0.2.1', "nginx cannot listen: bind() to 192.0.2.1:7443 failed"),
        ("127.0.0.1.pem", "later.pem", "option fleet_cert {directory}/later.pem of /models: there is no such file"),
    ],
)
def test_what_may_come_later_is_tried_again(mounts: Path, old: str, new: str, told: str) -> None:
    replace(mounts, old, new)
    done = mountctl_fleet(mounts, "run")
    assert done.stderr.startswith(f"mountctl: {told.format(directory=mounts.parent)}")
    unit = configparser.ConfigParser(strict=False)
    unit.read(UNIT)
    assert str(done.returncode) not in unit["Service"]["RestartPreventExitStatus"].split()
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"


def test_a_reload_signals_the_nginx_of_the_fleet_only(tmp_path: Path) -> None:
    nginx = Nginx(tmp_path)
    assert not nginx.reload()
    (tmp_path / "nginx.pid").write_text(f"{os.getpid()}\n")
    assert not nginx.reload()


def test_a_reload_that_nginx_refuses_is_an_error(mounts: Path, port: int) -> None:
    replace(mounts, f"127.0.0.1:{port}", f"0.0.0.0:{port}")
    done = mountctl_fleet(mounts, "drain")
    assert (done.returncode, done.stdout) == (126, "")
    told = f"mountctl: nginx keeps its old configuration: bind() to 0.0.0.0:{port} failed (98: "
    assert done.stderr.startswith(told)
    assert "`systemctl restart trimsfs-nginx`" in done.stderr
    replace(mounts, f"0.0.0.0:{port}", f"127.0.0.1:{port}")
    done = mountctl_fleet(mounts, "apply")
    assert (done.returncode, done.stdout) == (0, "/models: fleet models: drained\nreloaded nginx\n"), done.stderr


def test_a_command_waits_for_another_that_changes_nginx(mounts: Path) -> None:
    nginx = Nginx(mounts.parent / "fleet")
    with nginx.changing():
        draining = subprocess.Popen(command(mounts, "drain"), stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            draining.wait(2)
        assert not nginx.drained()
    assert draining.wait(20) == 0
    assert nginx.drained() == {"/models"}


def test_a_key_with_a_passphrase_is_refused_without_a_question(mounts: Path) -> None:
    key = mounts.parent / "127.0.0.1.key"
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encrypted = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted))
    done = mountctl_fleet(mounts, "apply")
    assert (done.returncode, "cannot load certificate key" in done.stderr) == (2, True), done.stderr
    with pytest.raises(ConfigurationError, match="the key without a passphrase"):
        certificate(load_options({}, configs=[mounts / "models.toml"]))


def test_a_host_that_leaves_its_fleet_closes_the_port(mounts: Path, port: int) -> None:
    declared = (mounts / "models.toml").read_text()
    (mounts / "models.toml").write_text("mountpoint = 1\n")
    done = mountctl_fleet(mounts, "apply")
    assert (done.returncode, str(mounts / "models.toml") in done.stderr, accepts(port)) == (2, True, True)
    (mounts / "models.toml").write_text(re.sub(r"(?m)^ *fleet.*\n", "", declared))
    done = mountctl_fleet(mounts, "apply")
    assert (done.returncode, accepts(port)) == (0, False), done.stderr
    assert done.stdout.startswith("reloaded nginx, which serves nothing, as no mount belongs to a fleet")
    (mounts / "models.toml").write_text(declared)
    assert mountctl_fleet(mounts, "apply").returncode == 0
    assert accepts(port)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_a_port_that_another_program_has_is_told(mounts: Path, host: str) -> None:
    family = socket.AF_INET6 if host == "[::1]" else socket.AF_INET
    with socket.create_server((host.strip("[]"), 0), family=family) as taken:
        address = f"{host}:{taken.getsockname()[1]}"
        replace(mounts, 'fleet_listen = "127.0.0.1:7443"', f'fleet_listen = "{address}"')
        done = mountctl_fleet(mounts, "run")
    told = f"mountctl: nginx cannot listen: {address}: Address already in use: end what `ss -ltnp` shows"
    assert (done.returncode, done.stderr.startswith(told)) == (126, True), done.stderr


def test_a_second_nginx_is_refused(mounts: Path, port: int) -> None:
    pid = (mounts.parent / "fleet/nginx.pid").read_text().strip()
    done = mountctl_fleet(mounts, "run")
    told = f"mountctl: nginx runs already, as process {pid}: `mountctl fleet apply` reloads it\n"
    assert (done.returncode, done.stderr) == (126, told)


def test_the_certificates_of_the_page_are_those_of_a_member(mounts: Path) -> None:
    page = (UNIT.parents[2] / "docs/operations.md").read_text().partition("\n## A fleet\n")[2]
    commands = page[page.index("openssl req -x509") : page.index("\n# on each host")]
    subprocess.run(["sh", "-ec", commands], cwd=mounts.parent, check=True, timeout=60, capture_output=True)
    for old, new in (("ca.pem", "fleet-ca.pem"), ("127.0.0.1.pem", "fleet.pem"), ("127.0.0.1.key", "fleet.key")):
        replace(mounts, f"/{old}", f"/{new}")
    done = mountctl_fleet(mounts, "apply")
    assert done.returncode == 0, done.stderr
    assert "valid for 36" in certificate(load_options({}, configs=[mounts / "models.toml"]))
    assert (mounts.parent / "fleet.key").stat().st_mode & 0o077 == 0
    for purpose in ("sslserver", "sslclient"):
        verify = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "fleet-ca.pem", "fleet.pem"]
        subprocess.run(verify, cwd=mounts.parent, check=True, timeout=60, capture_output=True)
