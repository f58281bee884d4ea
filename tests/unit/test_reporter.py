"""The keeper's log lines look as the server's do."""

import errno
import os
import re
import select
from pathlib import Path

import pytest

from mountctl.keeper.reporter import Reporter

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} %s mountctl\.keeper: %s"


def test_each_line_has_time_level_and_part(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(None, None)
    reporter.info("server 7 has taken over the mount")
    reporter.warning("server 7 has ended")
    reporter.error("servers keep crashing")
    reporter.outcome({"type": "failed"}, "no such bucket")

    wanted = [
        ("INFO", "server 7 has taken over the mount"),
        ("WARNING", "server 7 has ended"),
        ("ERROR", "servers keep crashing"),
        ("ERROR", "no such bucket"),
    ]
    for line, each in zip(capfd.readouterr().err.splitlines(), wanted, strict=True):
        assert re.fullmatch(LINE % each, line), line


def test_a_text_of_many_lines_forges_none(capfd: pytest.CaptureFixture[str]) -> None:
    Reporter(None, None).error("server 7 failed: a\n2026-01-01 00:00:00,000 ERROR forged\x1b[2J")

    first, second = capfd.readouterr().err.splitlines()
    assert first.endswith("server 7 failed: a")
    assert second == "  2026-01-01 00:00:00,000 ERROR forged\\x1b[2J"


def test_a_long_line_is_cut_to_what_a_pipe_takes_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    Reporter(None, None).error("x" * 10_000)
    written = capfd.readouterr().err
    assert (len(written), written[-2:]) == (select.PIPE_BUF, "x\n")


def test_a_log_that_cannot_be_rotated_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    def full(*_: object) -> None:
        nonlocal tried
        tried += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mountctl.linux.logfile.rotate", full)
    reporter = Reporter(None, tmp_path / "log")
    for _ in range(3):
        reporter.rotate_log()
    assert tried == 1


def test_a_command_that_waits_gets_the_outcome_and_the_log_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    receiver, sender = os.pipe()
    try:
        Reporter(sender, None).outcome({"type": "ready"}, "mounted")
        assert os.read(receiver, 100) == b'{"type": "ready"}\n'
    finally:
        os.close(receiver)
    assert capfd.readouterr().err == ""
