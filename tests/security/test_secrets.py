"""Credentials of a store, however a server has got them, are nowhere but in its memory and its environment."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import xattr

from tests.security.hostile import HostileStore, Told, hostile_store
from tests.security.processes import processes
from tests.services import HOST
from tests.support.http_server import Server
from tests.support.mounts import MOUNTCTL, MountedStore, log_beside, mounted, trimsfs
from tests.support.processes import alive, family
from tests.support.users import STRANGER, as_user

KEY, SECRET, TOKEN = "AKIAMARKER0000000001", "MARKERsecretOfTheTest0123456789abcdefABCD", "MARKERtokenOfTheTest+/=="
PASSWORD = "MARKERpasswordOfTheTest"
MARKERS = (SECRET, TOKEN, PASSWORD)
"""What nobody is to see. The access key is no secret, but a name."""


WAYS = [
    "environment",
    *(pytest.param(how, marks=pytest.mark.slow) for how in ("profile", "process", "instance", "container")),
]


@contextlib.contextmanager
def metadata() -> Iterator[str]:
    """Stands in for the metadata service of an instance, and for that of a container: it gives credentials."""
    told = {"AccessKeyId": KEY, "SecretAccessKey": SECRET, "Token": TOKEN, "Expiration": "2100-01-01T00:00:00Z"}

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        roles = "role" if request.path.endswith("/security-credentials/") else json.dumps({"Code": "Success", **told})
        return 200, {}, (TOKEN if request.command == "PUT" else roles).encode()

    with Server(answer).running() as server:
        yield server.url


@contextlib.contextmanager
def given(how: str, directory: Path) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """The variables and the options of credentials that are given in one of the ways."""
    values = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "aws_session_token": TOKEN}
    file, lines = directory / "credentials", [f"{name} = {value}" for name, value in values.items()]
    if how == "environment":
        yield {name.upper(): value for name, value in values.items()}, ()
    elif how == "profile":
        file.write_text("\n".join(["[models]", *lines]))
        file.chmod(0o600)
        yield {"AWS_SHARED_CREDENTIALS_FILE": str(file)}, ("--profile", "models")
    elif how == "process":
        printed = {"Version": 1, "AccessKeyId": KEY, "SecretAccessKey": SECRET, "SessionToken": TOKEN}
        (directory / "printed").write_text(json.dumps(printed))
        file.write_text(f"[profile models]\ncredential_process = cat {directory / 'printed'}")
        file.chmod(0o600)
        yield {"AWS_CONFIG_FILE": str(file)}, ("--profile", "models")
    else:
        with metadata() as url:
            instance = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "AWS_EC2_METADATA_DISABLED": "false"}
            container = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{url}/credentials"}
            container["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = TOKEN
            yield instance if how == "instance" else container, ()


def everything_told(mount: MountedStore, environment: dict[str, str], options: tuple[str, ...]) -> dict[str, str]:
    """All that a mount shows and leaves behind, by where."""
    told: dict[str, str] = {"log": mount.log(), "mounts": Path("/proc/mounts").read_text()}
    root = mount.path / ".trims"
    for path in (*root.iterdir(), *(root / "model").iterdir(), *(root / ".trims").iterdir()):
        if path.is_file():
            told[str(path)] = path.read_text(errors="replace")
    for name in xattr.listxattr(mount.path / "model"):
        told[name] = xattr.getxattr(mount.path / "model", name).decode()
    for pid in family(mount.control()["keeper_pid"]):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            told[f"cmdline of {pid}"] = Path(f"/proc/{pid}/cmdline").read_text()
            told[f"comm of {pid}"] = Path(f"/proc/{pid}/comm").read_text()
    for directory, _, names in os.walk(mount.cache):
        for path in (Path(directory, name) for name in names):
            with contextlib.suppress(FileNotFoundError):  # it is there no longer
                if path.is_file():
                    told[str(path)] = path.read_text(errors="replace")
    arguments: list[tuple[str | Path, ...]] = [
        ("status", "--json", mount.path),
        ("warm", mount.path / "refused"),
        ("doctor", "--store", "s3://bucket", *options),
    ]
    for command in arguments:
        done = trimsfs(*command, environment=environment)
        told[" ".join(map(str, command))] = done.stdout + done.stderr
    done = subprocess.run([MOUNTCTL, "status", "--json"], capture_output=True, text=True, timeout=60, check=False)
    told["mountctl status"] = done.stdout + done.stderr
    return told


def answer(store: HostileStore, refusal: str) -> None:
    """Have the store refuse one object, in words of its own."""

    def said(_method: str, key: bytes, _query: dict[str, str]) -> tuple[int, dict[str, str], bytes] | None:
        if key != b"refused":
            return None
        message = f"<Error><Code>{refusal}</Code><Message>no: {store.http.requests[-1][0]}</Message></Error>"
        return 403, {}, message.encode()

    store.answer = said


@pytest.mark.parametrize("how", WAYS)
def test_no_secret_is_told_however_it_was_given(how: str, tmp_path: Path) -> None:
    objects = {b"model": Told(content=b"weights"), b"refused": Told(content=b"weights")}
    unset = {"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}
    directory = tmp_path / "mount"
    with hostile_store(objects) as store, given(how, tmp_path) as (variables, options):
        where = {"AWS_ENDPOINT_URL": store.server.endpoint_url, "AWS_REGION": "us-east-1", "NO_PROXY": HOST}
        environment = unset | where | variables
        answer(store, "SignatureDoesNotMatch")
        with mounted(store.url, directory, "--log-level", "debug", *options, environment=environment) as mount:
            assert (mount.path / "model").read_bytes() == b"weights"
            with pytest.raises(PermissionError):
                (mount.path / "refused").read_bytes()
            told = everything_told(mount, environment, options)
            lasting, passing = processes(mount)
            for pid in lasting | passing:
                with pytest.raises(AssertionError) as caught:
                    as_user(STRANGER, Path(f"/proc/{pid}/environ").read_bytes)
                ended = pid in passing and not alive(pid)
                assert ended or "PermissionError" in str(caught.value)
        told["log at the end"] = log_beside(directory).read_text()
    assert any(KEY in headers.get("authorization", "") for _, headers in store.http.requests)
    assert len(told) > 20
    for where_told, text in told.items():
        for marker in (*MARKERS, "Signature="):
            assert marker not in text, where_told


def test_a_password_in_a_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    """All users may read the list of mounts."""
    for url in (f"ftp://user:{PASSWORD}@{HOST}/models", f"s3://{KEY}:{PASSWORD}@bucket/models"):
        for environment, arguments in (({}, ("--store", url)), ({"TRIMSFS_STORE": url}, ())):
            done = trimsfs("mount", tmp_path, *arguments, environment=environment)
            assert done.returncode == 2, done.stderr
            assert done.stderr.count("\n") == 1
            assert "credentials do not belong there" in done.stderr
            assert PASSWORD not in done.stderr
    (tmp_path / "mount.toml").write_text(f'store = "ftp://user:{PASSWORD}@{HOST}/models"\n')
    done = trimsfs("doctor", "--config", tmp_path / "mount.toml")
    assert done.returncode == 2
    assert PASSWORD not in done.stderr + done.stdout
