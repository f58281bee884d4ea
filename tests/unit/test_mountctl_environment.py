"""Whose ``TRIMSFS_*`` variables hold for a mount: those of its service, and of who mounts in the background."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mountctl.commands import mount_status, verbs
from tests.support.keeper_in_process import keeper_in_process
from trimsfs.options import load_options

FACTS = {"state": "serving", "restarts": 0, "environment": {"TRIMSFS_METADATA_TTL": "7"}}


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a declared mount, where this process has another variable than its service."""
    (tmp_path / "one.toml").write_text('mountpoint = "/nowhere/one"\nstore = "/store"')
    monkeypatch.setenv("TRIMSFS_METADATA_TTL", "5")
    monkeypatch.setattr(mount_status, "store_status", lambda *_, **__: {})
    return tmp_path


@pytest.mark.parametrize(("foreground", "ttl_s"), [(True, 7), (False, 5)], ids=["service", "background"])
def test_an_upgrade_takes_the_variables_of_the_service(
    foreground: bool, ttl_s: int, declared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def ask(_: Path, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        asked.append(request)
        return {"server_pid": 7}

    monkeypatch.setattr(verbs, "status_of", lambda _: FACTS | {"foreground": foreground})
    monkeypatch.setattr(verbs, "trimsfs_at", lambda _: True)
    monkeypatch.setattr(verbs, "ask", ask)
    assert isinstance(verbs.upgrade, click.Command)
    done = CliRunner().invoke(verbs.upgrade, ["one", "--mounts-dir", str(declared)])
    assert done.exit_code == 0, done.output
    (request,) = asked
    assert (request["order"]["options"]["metadata_ttl"], request["order"]["foreground"]) == (ttl_s, foreground)


def test_a_keeper_tells_its_variables_with_options_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMSFS_METADATA_TTL", "7")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with keeper_in_process([]) as (keeper, _):
        told = keeper._status()["environment"]
    assert told["TRIMSFS_METADATA_TTL"] == "7"
    assert all(name.startswith("TRIMSFS_") for name in told)
    assert load_options({}, environment=told).metadata_ttl == 7


def test_status_shows_no_variables(declared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "status_of", lambda _: FACTS)
    assert isinstance(verbs.status, click.Command)
    done = CliRunner().invoke(verbs.status, ["one", "--json", "--mounts-dir", str(declared)])
    assert done.exit_code == 0, done.output
    (facts,) = json.loads(done.stdout)
    assert "environment" not in facts
