"""`trimsfs doctor`, run in this process."""

import json
import resource
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.mounts import settings
from trimsfs.cli.diagnosis.doctor import doctor
from trimsfs.options import load_options


def told(*arguments: str) -> dict[str, tuple[str, str]]:
    """What each check tells: its result and its message."""
    rest, variables = settings(["gpu=off", "passthrough=no", *arguments])
    done = CliRunner().invoke(doctor, ["--json", *map(str, rest)], env=variables)
    return {one["check"]: (one["result"], one["message"]) for one in json.loads(done.stdout)}


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    """The file of a declared mount."""
    file = tmp_path / "models.toml"
    file.write_text(f'mountpoint = "/trimsfs-of-tests"\nstore = "{tmp_path}"\n')
    return file


def test_the_cache_directory_is_that_of_the_declared_mount(declared: Path) -> None:
    directory = load_options({}, configs=[declared]).resolved(Path("/trimsfs-of-tests")).cache_dir
    assert told("--config", str(declared))["cache"][1].startswith(f"{directory}: ")


def test_the_limit_of_locked_memory_is_told(declared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, capability, expected in (
        (resource.RLIM_INFINITY, 99, ("ok", "no limit: `trimsfs pin` locks whole models")),
        (8 << 20, 0, ("ok", "no limit: `trimsfs pin` locks whole models")),
        (8 << 20, 63, ("note", "at most 8 MiB: `trimsfs pin` keeps what is more on disk only: raise it ")),
    ):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        monkeypatch.setattr("trimsfs.cli.diagnosis.doctor.CAP_SYS_RESOURCE", capability)
        result, message = told("--config", str(declared))["locked memory"]
        assert (result, message.startswith(expected[1])) == (expected[0], True), message


def test_a_ca_file_without_a_certificate_is_named(declared: Path, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    for content in ("", "no certificate"):
        file.write_text(content)
        arguments = ("--config", str(declared), "--store", "s3://models", "--endpoint-url", "https://127.0.0.1:1")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_CA_BUNDLE", str(file))
            found = told(*arguments)["store"]
        remedy = "name another in AWS_CA_BUNDLE or ca_bundle"
        assert found == ("FAIL", f"CA file {file}: has no certificate in PEM: {remedy}")


def test_a_fleet_without_its_extra_fails(declared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("trimsfs.extras.fleet.member_checks", "trimsfs.extras.fleet.connection"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "h11", None)
    files = [f"fleet_{name}={tmp_path / name}" for name in ("ca", "cert", "key")]
    members = ["fleet=f", "fleet_members=10.0.0.1:7443", "fleet_listen=10.0.0.1:7443"]
    result, message = told("--config", str(declared), *members, *files)["fleet"]
    assert result == "FAIL"
    assert message.endswith(": pip install 'trimsfs[fleet]'")
