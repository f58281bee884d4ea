"""The core works without the extras: it names none of them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mountctl
import trimsfs
from tests.support import processes
from tests.support.mounts import unmount

CONTENT = os.urandom(300_000)


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """A directory with both programs, of which the packages of extras cannot be imported."""
    for program in (trimsfs, mountctl):
        assert program.__file__ is not None
        copy = tmp_path / "core" / program.__name__
        shutil.copytree(Path(program.__file__).parent, copy, ignore=shutil.ignore_patterns("extras", "__pycache__"))
        (copy / "extras.py").write_text(f'raise ModuleNotFoundError(name="{copy.name}.extras")\n')
    return tmp_path / "core"


def run(core: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run ``trimsfs`` of the core alone."""
    environment = os.environ | {"PYTHONPATH": str(core), "TRIMSFS_SERVER_USER": str(os.geteuid())}
    return processes.run(sys.executable, "-m", "trimsfs", *arguments, cwd=core, env=environment)


@contextmanager
def mounted_alone(core: Path, tmp_path: Path) -> Iterator[Path]:
    store, mountpoint = tmp_path / "store", tmp_path / "models"
    store.mkdir()
    (store / "params").write_bytes(CONTENT)
    done = run(core, "mount", "--cache-dir", tmp_path / "cache", "--min-free", "0", store, mountpoint)
    assert done.returncode == 0, done.stderr
    try:
        yield mountpoint
    finally:
        unmount(mountpoint)


def test_models_are_served_watched_and_evicted(core: Path, tmp_path: Path) -> None:
    with mounted_alone(core, tmp_path) as models:
        assert (models / "params").read_bytes() == CONTENT
        status = run(core, "status", models)
        assert (status.returncode, status.stderr) == (0, "")
        assert f"{models}: {tmp_path / 'store'}" in status.stdout
        for command in ("warm", "verify", "evict"):
            done = run(core, command, models / "params")
            assert (done.returncode, done.stderr) == (0, ""), command
        assert os.getxattr(models / "params", "user.trims.verified") == b"false"
        assert (models / "params").read_bytes() == CONTENT


def test_what_extras_add_is_told_as_unknown(core: Path, tmp_path: Path) -> None:
    shown = run(core, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "mount" in shown.stdout
    assert "push" not in shown.stdout
    done = run(core, "push", tmp_path, "s3://models/a:v1")
    assert (done.returncode, "No such command 'push'" in done.stderr) == (2, True)
    done = run(core, "mount", "gs://models", tmp_path / "models")
    assert done.returncode == 2
    assert "store gs://models: no store has this scheme" in done.stderr
