"""Programs that open files without looking them up: on-access scanners, and overlays over a mount."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mount_namespace import mounted_apart
from tests.support.mounts import MountedStore, mounted, overlay, trimsfs, wait_until

KINDS = ("cold", "resident", "evicted", "replaced")
OPENS = 25
"""Files of each kind."""


def content(kind: str, number: int, version: int = 0) -> bytes:
    return f"{kind} {number} {version} ".encode() * 20_000


@pytest.fixture(params=["auto", *(pytest.param(how, marks=pytest.mark.slow) for how in ("stream", "wait"))])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MountedStore]:
    """Files of all kinds, each in its state."""
    store = tmp_path / "store"
    for kind in KINDS:
        (store / kind).mkdir(parents=True)
        for number in range(OPENS):
            (store / kind / f"{number}.safetensors").write_bytes(content(kind, number))
    options = ("--cold-open", request.param, "--prefetch", "off", "--metadata-ttl", "1")
    with mounted(store, tmp_path, *options) as mount:
        yield mount


def bring_about(mount: MountedStore, store: Path) -> None:
    """Have the files of each kind in their state: cold ones stay as they are."""
    for kind in ("resident", "evicted"):
        assert trimsfs("warm", mount.path / kind).returncode == 0
    assert trimsfs("evict", mount.path / "evicted").returncode == 0
    for number in range(OPENS):
        (store / "replaced" / f"{number}.safetensors").write_bytes(content("replaced", number, 1))


@contextmanager
def scanning(mountpoint: Path) -> Iterator[Callable[[], int]]:
    """An on-access scanner of a mount; the function ends it and tells how many files it has seen."""
    command = [sys.executable, "-m", "tests.fuse.scanner", str(mountpoint)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as scanner:
        assert scanner.stdout is not None
        assert scanner.stdin is not None
        try:
            assert scanner.stdout.readline() == "ready\n"

            def end() -> int:
                return int(scanner.communicate(timeout=30)[0])

            yield end
        finally:
            scanner.kill()


def is_shown(mount: MountedStore, path: Path) -> bool:
    """Whether the mount shows the last version of a replaced file. An overlay keeps the one that it meets."""
    return (mount.path / "replaced" / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns


def wait_until_shown(mount: MountedStore, store: Path) -> None:
    """Wait until the mount no longer believes the names of replaced files."""
    wait_until(lambda: all(is_shown(mount, path) for path in (store / "replaced").iterdir()))


def read_all(path: Path) -> list[str]:
    """What goes wrong when the files of all kinds are read at a path."""
    wrong = []
    for kind in KINDS:
        version = 1 if kind == "replaced" else 0
        for number in range(OPENS):
            try:
                found = (path / kind / f"{number}.safetensors").read_bytes()
            except OSError as error:
                wrong.append(f"{kind} {number}: {error}")
            else:
                if found != content(kind, number, version):
                    wrong.append(f"{kind} {number}: wrong bytes")
    return wrong


def test_a_scanner_makes_no_open_fail(mount: MountedStore, tmp_path: Path) -> None:
    for kind in KINDS:  # the kernel knows the names of before
        assert len(list((mount.path / kind).iterdir())) == OPENS
    with scanning(mount.path) as end:
        bring_about(mount, tmp_path / "store")
        wait_until_shown(mount, tmp_path / "store")
        assert read_all(mount.path) == []
        assert read_all(mount.path) == []
        assert end() >= 2 * len(KINDS) * OPENS


@contextmanager
def overlaid(directory: Path, lower: Path) -> Iterator[Path]:
    """An overlay over a mount."""
    with mounted_apart(lower, *overlay(directory, lower)) as root:
        yield root / (directory / "merged").relative_to("/")


def test_an_overlay_reads_files_of_all_kinds(mount: MountedStore, tmp_path: Path) -> None:
    with overlaid(tmp_path / "overlay", mount.path) as merged:
        for kind in KINDS:
            assert len(list((merged / kind).iterdir())) == OPENS
        for kind in KINDS[:-1]:  # an overlay goes on with the file that it has met at a name
            assert (merged / kind / "0.safetensors").stat().st_size == len(content(kind, 0))
        bring_about(mount, tmp_path / "store")
        wait_until_shown(mount, tmp_path / "store")
        assert read_all(merged) == []
        for change in ("warm", "evict", "warm"):
            for kind in KINDS:
                assert trimsfs(change, mount.path / kind).returncode == 0
            assert read_all(merged) == []
            assert read_all(mount.path) == []
