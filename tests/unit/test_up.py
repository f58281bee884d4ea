"""What ``mountctl up`` says of a mount that is there already."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from mountctl.commands import up as command
from mountctl.commands.declared_mounts import NamedMount
from mountctl.commands.mount_status import NOT_KEPT
from trimsfs.mountinfo import Mount

STORE = "/store"


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of declared mounts, all of which are there by the kernel's table, and have their store."""

    def mounted(mountpoint: Path) -> Mount:
        return Mount(number=1, parent=0, mountpoint=mountpoint, device="0:51", kind="fuse.trimsfs", source=STORE)

    for name in ("one", "other"):
        (tmp_path / f"{name}.toml").write_text(f'mountpoint = "/nowhere/{name}"\nstore = "{STORE}"')
    monkeypatch.setattr(command, "trimsfs_at", mounted)
    monkeypatch.setattr(command, "without_store", lambda mount: 0)
    return tmp_path


def up(directory: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]) -> Result:
    """Run it where the first mount has this status, and the other one serves."""

    def status_of(mount: NamedMount) -> dict[str, Any]:
        return facts if mount.name == "one" else {"state": "serving"}

    monkeypatch.setattr(command, "status_of", status_of)
    assert isinstance(command.up, click.Command)
    return CliRunner().invoke(command.up, ["--mounts-dir", str(directory)])


@pytest.mark.parametrize(
    ("facts", "code", "told"),
    [
        ({"state": NOT_KEPT, "error": "the keeper is gone: run it"}, 1, "not kept at /nowhere/one: the keeper is gone"),
        (
            {"state": "hanging", "error": "the keeper is stopped"},
            10,
            "hanging at /nowhere/one: the keeper is stopped\n",
        ),
        ({"state": "hanging"}, 10, "hanging at /nowhere/one: see `mountctl logs one`\n"),
        ({"state": "starting"}, 10, "starting at /nowhere/one: see `mountctl logs one`\n"),
    ],
)
def test_a_mount_that_is_not_well_is_not_called_up(
    facts: dict[str, Any], code: int, told: str, declared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = up(declared, monkeypatch, facts)
    assert (done.exit_code, done.stdout) == (code, "other is up at /nowhere/other\n"), done.output
    assert done.stderr.startswith(f"mountctl: one: {told}")


def test_the_store_of_a_service_is_that_of_its_own_variables(declared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (declared / "one.toml").write_text('mountpoint = "/nowhere/one"\n')
    facts = {"state": "serving", "foreground": True, "environment": {"TRIMSFS_STORE": STORE}}
    assert up(declared, monkeypatch, facts).exit_code == 0
    monkeypatch.setenv("TRIMSFS_STORE", "/elsewhere")
    (declared / "other.toml").unlink()
    assert up(declared, monkeypatch, facts).exit_code == 0
    assert up(declared, monkeypatch, facts | {"foreground": False}).exit_code == 4, "a mount of this user"


def test_each_mount_that_fails_is_named_and_the_others_go_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "mounts.d").mkdir()
    for name, mountpoint in (("one", tmp_path / "file"), ("other", tmp_path / "other")):
        (tmp_path / f"mounts.d/{name}.toml").write_text(f'mountpoint = "{mountpoint}"\nstore = "{tmp_path}/nowhere"')
    monkeypatch.setattr("mountctl.linux.systemd.manages", lambda _name: False)
    assert isinstance(command.up, click.Command)
    done = CliRunner().invoke(command.up, ["--mounts-dir", str(tmp_path / "mounts.d")])
    first, second = done.output.splitlines()
    assert first == f"mountctl: one: {tmp_path}/file: File exists: name a directory"
    assert second.startswith("mountctl: other: ")
    assert f"{tmp_path}/nowhere" in second
    assert done.exit_code != 0
