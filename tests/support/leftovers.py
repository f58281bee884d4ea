"""What a run of the tests must not leave: processes, mounts, temporary files, device files that are none any more.

A pytest plugin. All processes that tests start inherit a mark in their environment, unless they get one of their own.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.shared_by_run import MARK, shared_by_run
from trimsfs import mountinfo

DEVICES = ("full", "fuse", "null", "random", "tty", "urandom", "zero")
TEMPORARY = ("oras-tmp", "seaweedfs-", "trimsfs-emulated-cuda-", "trimsfs-tests-")
"""How names in the temporary directory begin that tests and their services make; others are perhaps not of this run."""
_BEFORE = pytest.StashKey[set[str]]()
END_TIMEOUT_S = 15.0
"""How long what a run has started may take to end by itself."""


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        os.environ[MARK] = f"{os.getpid()}-{uuid.uuid4().hex}"
        # PyTorch would leave a directory in the temporary directory.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(shared_by_run(os.environ[MARK]) / "torchinductor")
        session.config.stash[_BEFORE] = _temporary()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Tell what is left and end it, also when the run was interrupted. It makes a run fail that has passed."""
    if hasattr(session.config, "workerinput"):
        return
    factory: pytest.TempPathFactory = session.config._tmp_path_factory  # type: ignore[attr-defined]
    left = _left(factory.getbasetemp())
    shutil.rmtree(shared_by_run(os.environ[MARK]), ignore_errors=True)
    before = session.config.stash[_BEFORE]
    made = sorted(_temporary() - before)
    left += [f"temporary file {Path(tempfile.gettempdir(), name)}" for name in made]
    if not left:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.section("left behind")
        for line in left:
            reporter.line(line)
    if exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _left(directory: Path) -> list[str]:
    """What is left, of mounts those below a directory; ends and unmounts it."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while (_processes() or _mounts(directory)) and time.monotonic() < deadline:
        time.sleep(0.2)
    told = [f"/dev/{name} is no device any more" for name in DEVICES if not _is_device(Path("/dev") / name)]
    for pid in _processes():
        with suppress(OSError):  # it has ended
            title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
            told.append(f"process {pid}: {title[:200]}")
            os.kill(pid, signal.SIGKILL)
    for mountpoint in reversed(_mounts(directory)):
        told.append(f"mount {mountpoint}")
        subprocess.run(["umount", "--lazy", mountpoint], timeout=30, check=False, capture_output=True)
    return told


def _temporary() -> set[str]:
    names = os.listdir(tempfile.gettempdir())
    made = (name for name in names if name.startswith(TEMPORARY) or re.fullmatch(r"trimsfs-\d+", name))
    return {name for name in made if not _of_another_run(name)}


def _of_another_run(name: str) -> bool:
    """Whether a process of another run uses a name: its number is in it, or it listens there."""
    told = re.match(r"trimsfs-tests-(\d+)-", name)
    if told is not None:
        return int(told[1]) != os.getpid() and Path("/proc", told[1]).exists()
    return f" {Path(tempfile.gettempdir(), name)}\n" in Path("/proc/net/unix").read_text()


def _processes() -> list[int]:
    """The processes with the mark of this run, but for itself."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it has ended, or is another user's
            if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0") and int(name) != os.getpid():
                found.append(int(name))
    return found


def _mounts(directory: Path) -> list[Path]:
    return [mount.mountpoint for mount in mountinfo.mounts(None) if directory in mount.mountpoint.parents]


def _is_device(path: Path) -> bool:
    return not path.exists() or stat.S_ISCHR(path.stat().st_mode)
