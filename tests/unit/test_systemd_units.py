"""Which unit of systemd is that of a declared mount."""

from pathlib import Path

import pytest

from mountctl.linux import systemd


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a stand-in of ``systemctl`` is called with; it says of the server's unit what the file ``told`` does."""
    program = tmp_path / "systemctl"
    program.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/called
case "$*" in show*trimsfs-server@*) cat {tmp_path}/told; esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "called"


@pytest.mark.parametrize(
    ("active", "file", "unit"),
    [
        ("inactive", "disabled", "trimsfs@models.service"),
        ("inactive", "", "trimsfs@models.service"),
        ("failed", "disabled", "trimsfs@models.service"),
        ("inactive", "enabled", "trimsfs-server@models.service"),
        ("failed", "enabled-runtime", "trimsfs-server@models.service"),
        ("active", "disabled", "trimsfs-server@models.service"),
        ("activating", "disabled", "trimsfs-server@models.service"),
    ],
)
def test_the_unit_of_a_server_is_that_of_its_mount_if_enabled_or_active(
    active: str, file: str, unit: str, called: Path
) -> None:
    called.with_name("told").write_text(f"ActiveState={active}\nUnitFileState={file}\n")
    assert systemd.unit_of("models") == unit
    assert called.read_text().count("\n") == 1

    assert (systemd.start("models"), systemd.stop("models")) == ((0, ""), 0)
    lines = called.read_text().splitlines()
    assert [line for line in lines if not line.startswith("show")] == [f"start {unit}", f"stop {unit}"]
