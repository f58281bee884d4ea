"""``trimsfs status`` without a mount: what it tells of a fleet, a cache and files in quarantine, as does ``ls``."""

from typing import TYPE_CHECKING, Any

import pytest

from trimsfs.cli.ls import Row, _print
from trimsfs.cli.watch.status import DEGRADED, _exit_code, _show, told_of_fleet
from trimsfs.fuse.kernel_features import lacking

if TYPE_CHECKING:
    from trimsfs.fuse._libfuse import _Connection

FACTS: dict[str, Any] = {
    "mountpoint": "/models",
    "store": "s3://models",
    "keeper_pid": 1,
    "server_pid": 2,
    "version": "1",
    "cache_dir": "/cache",
    "log_file": None,
    "metrics": {"trimsfs_disk_budget_bytes": 5e9},
    "processes": {"keeper": 1, "server": 1},
    "descriptors": {"open": 9, "limit": 1024},
    "cache_disk_bytes": None,
    "quarantine": [],
    "passthrough": {"used": True},
    "kernel": {"release": "6.18", "lacks": []},
    **dict.fromkeys(("cache_problem", "keeper_problem", "store_problem", "store_empty")),
}

NEW: "_Connection" = {"interposed": True, "passthrough": True, "direct": True, "resends": True, "minor": 45}
"""What Linux 6.18 agrees to."""


def test_files_in_quarantine_degrade_a_mount_and_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    facts = FACTS | {"quarantine": [f"m/{number}" for number in range(7)], "quarantine_problem": "in quarantine: m/0"}
    assert _exit_code(facts) == DEGRADED
    _show(facts)
    named = ", ".join(f"/models/m/{number}" for number in range(5))
    assert f"  quarantine  7 files: {named} and 2 more\n" in capsys.readouterr().out


def test_what_the_kernel_lacks_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lacks = lacking({"interposed": True, "passthrough": False, "direct": False, "resends": False, "minor": 37})
    assert len(lacks) == 4
    assert not lacking(NEW)
    assert [lack.split(" (")[0] for lack in lacking({**NEW, "minor": 41})] == ["no pruning of names"]
    facts = FACTS | {"passthrough": {"used": False, "reason": "old"}, "kernel": {"release": "6.1", "lacks": lacks}}
    assert _exit_code(facts) == 0
    _show(facts)
    told = capsys.readouterr().out
    assert "  passthrough not used: old: files are served in cached mode\n" in told
    assert "  kernel      Linux 6.1 has no takeover (Linux 6.9): the mount ends with its server\n" in told
    _show(FACTS)
    told = capsys.readouterr().out
    assert "kernel" not in told
    assert "passthrough" not in told


def test_ls_marks_models_with_files_in_quarantine(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"/m/a": Row(files=2, size=10, disk=10, pinned=1), "/m/b": Row(files=1, size=5)}
    _print(rows, False)
    assert "quarantine" not in (plain := capsys.readouterr().out)
    assert plain.splitlines()[1].endswith("  1 file")
    rows["/m/b"].quarantined = 1
    _print(rows, False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("  1 in quarantine") for line in lines] == [False, False, True, True]


def test_a_cache_larger_than_its_disk_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    _show(FACTS | {"cache_disk_bytes": 10**9})
    assert "  cache       0 bytes of 5.0 GB (its file system has 1.0 GB) in /cache\n" in capsys.readouterr().out
    _show(FACTS | {"cache_disk_bytes": 10**10})
    assert "  cache       0 bytes of 5.0 GB in /cache\n" in capsys.readouterr().out


def test_a_fleet_is_told_with_what_keeps_this_host_out_of_it() -> None:
    member = {"address": "10.0.0.1:7443", "problem": None, "received_bytes": 0, "strikes": 0}
    facts = {"name": "f", "on": True, "drained": False, "problem": None, "me": "10.0.0.1:7443", "members": [member]}
    assert told_of_fleet(facts, 0) == ["f, 1 member: 0 bytes from others, 0 bytes sent"]
    assert told_of_fleet(facts | {"drained": True}, 0)[0].endswith("sent; drained: `mountctl fleet undrain`")
    assert told_of_fleet(facts | {"problem": "No such file"}, 0)[1:] == [
        "members not read: No such file: see fleet_members"
    ]
    assert told_of_fleet(facts | {"on": False}, 0) == ["f, 1 member: off: turn it on by `trimsfs fleet on`"]
