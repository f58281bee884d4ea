"""``mountctl logs`` of a mount whose keeper and server have ended, and of one that logs to standard error."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from mountctl.commands import mount_status, verbs


def test_the_log_of_a_dead_mount_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "mount.log"
    log.write_text("first\nlast\n")
    monkeypatch.setenv("TRIMSFS_LOG_FILE", str(log))
    monkeypatch.setattr(verbs, "status_of", lambda _: {"state": mount_status.DEAD})

    done = CliRunner().invoke(verbs.logs, [f"{tmp_path}/models", "-n", "1", "--mounts-dir", str(tmp_path)])

    assert (done.exit_code, capfd.readouterr().out) == (0, "last\n"), done.output
