"""Programs that wait for what a store does not give: they fail soon, are told why, and end when they are told to."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.fast import start_fast
from tests.services.faulty import FaultyS3, Plan, faulty
from tests.support import defective
from tests.support.keepers import have_serve
from tests.support.mounts import MountedStore, mounted
from trimsfs.types import CHUNK_SIZE

DEADLINE_S = 2.0
CHUNKS = 9
OPTIONS = ("--cold-open", "stream", "--prefetch", "off", "--retry-deadline", str(DEADLINE_S), "stall_timeout=60")
FILES = ("mapped", "opened", "read", "touched", "killed", "lost", "deleted")

FAULT_ALL = """
import json, mmap, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDONLY)
size, step, began, ended = os.fstat(descriptor).st_size, int(sys.argv[2]), time.monotonic(), {}
mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
for offset in range(0, size, step):
    child = os.fork()
    if child == 0:
        mapping[offset]
        os._exit(0)
    ended[child] = os.WTERMSIG(os.waitpid(child, 0)[1])
print(json.dumps([time.monotonic() - began, ended]))
"""
"""Touches a page in each piece of a mapping, in a process of its own."""

WAIT = """
import mmap, os, sys
kind, path = sys.argv[1:]
descriptor = os.open(path, os.O_RDONLY) if kind != "stat" else -1
print("waiting", flush=True)
try:
    if kind == "stat":
        os.stat(path)
    elif kind == "read":
        os.read(descriptor, 1 << 20)
    else:
        mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        if kind == "touch-at-random":
            mapping.madvise(mmap.MADV_RANDOM)  # no read ahead, but a read that no signal ends
        mapping[0]
except (KeyboardInterrupt, InterruptedError):
    os._exit(130)
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """A mount, and the proxy between it and its store."""

    mount: MountedStore
    store: FaultyS3
    directory: Path
    """The store's files."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A mount of which all names but ``new`` are known and no content."""
    directory = tmp_path_factory.mktemp("failures")
    models = directory / "buckets/bucket/models"
    models.mkdir(parents=True)
    for name in FILES:
        (models / name).touch()
        os.truncate(models / name, CHUNKS * CHUNK_SIZE)
    (models.parent / "new").mkdir()
    (models.parent / "new/file").touch()
    (models.parent / "endless").mkdir()
    (models.parent / "endless/file").write_bytes(b"content")
    with (
        start_fast(directory / "buckets") as server,
        faulty(server) as store,
        mounted("s3://bucket", directory / "mount", *OPTIONS, environment=store.environment()) as mount,
    ):
        assert sorted(os.listdir(mount.path / "models")) == sorted(FILES)
        yield Scene(mount, store, models)


@pytest.fixture(scope="module")
def mapped(scene: Scene) -> tuple[float, dict[str, int]]:
    """How long it takes until all who touch a mapping have ended, and the signals that end them."""
    scene.store.inject(Plan(faults=["slow down"], only="mapped"))
    command = [sys.executable, "-c", FAULT_ALL, str(scene.mount.path / "models/mapped"), str(CHUNK_SIZE)]
    took, ended = json.loads(subprocess.run(command, capture_output=True, timeout=120, check=True).stdout)
    return took, ended


def test_a_mapping_that_cannot_be_completed_waits_for_one_deadline(mapped: tuple[float, dict[str, int]]) -> None:
    took, ended = mapped
    assert list(ended.values()) == [signal.SIGBUS] * CHUNKS
    assert took < CHUNKS * DEADLINE_S / 2


def test_the_log_names_each_program_whose_mapping_fails(scene: Scene, mapped: tuple[float, dict[str, int]]) -> None:
    _, ended = mapped
    lines = [line for line in scene.mount.log().splitlines() if "models/mapped: the file cannot be completed" in line]
    assert len(lines) == CHUNKS
    for pid, line in zip(ended, lines, strict=True):
        assert f"pid {pid} (" in line
        assert "cannot be completed: Input/output error: models/mapped at " in line
        assert "SlowDown" in line


def test_the_client_raises_for_what_cannot_be_completed(scene: Scene) -> None:
    scene.store.inject(Plan(faults=["slow down"], only="opened"))
    path = scene.mount.path / "models/opened"
    load = "import sys, trimsfs; trimsfs.open(sys.argv[1]).numpy()"
    done = subprocess.run([sys.executable, "-c", load, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    told = rf"cannot be completed: models/opened at \d+: SlowDown.*`trimsfs status`: '{path}'"
    assert re.match(rf"OSError: \[Errno {errno.EIO}\] Input/output error: {told}", done.stderr.splitlines()[-1])


def test_a_listing_without_an_end_is_given_up_and_its_files_are_read(scene: Scene) -> None:
    scene.store.inject(Plan(faults=["listing without an end"], only="list-type"))
    directory, before = scene.mount.path / "endless", scene.store.injected().total()
    for _ in range(3):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.listdir(directory)
    assert (directory / "file").read_bytes() == b"content"
    assert scene.store.injected().total() - before < 10
    scene.store.heal()
    assert "/endless/: the listing has no end: page 2 repeats an earlier one" in scene.mount.log()


def test_an_object_that_is_not_found_for_a_moment_is_read(scene: Scene) -> None:
    before = scene.store.injected()["no such object"]
    scene.store.inject(Plan(faults=["no such object"], only="lost", first=1))
    assert (scene.mount.path / "models/lost").read_bytes() == bytes(CHUNKS * CHUNK_SIZE)
    assert scene.store.injected()["no such object"] > before
    assert "models/lost has been deleted" not in scene.mount.log()
    scene.store.heal()


def test_an_object_that_was_deleted_is_told_soon(scene: Scene, tmp_path: Path) -> None:
    options = (*OPTIONS, "--retry-deadline", "20")
    with mounted("s3://bucket", tmp_path, *options, environment=scene.store.environment()) as mount:
        path = mount.path / "models/deleted"
        with path.open("rb") as file:
            (scene.directory / "deleted").unlink()
            began = time.monotonic()
            with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                file.read(10)
            assert time.monotonic() - began < 10
        with pytest.raises(FileNotFoundError):
            path.stat()


@pytest.mark.parametrize(
    ("kind", "path", "number"),
    [
        ("read", "models/read", signal.SIGINT),
        ("stat", "new/file", signal.SIGINT),
        ("touch", "models/touched", signal.SIGTERM),
        ("touch-at-random", "models/killed", signal.SIGKILL),
    ],
)
def test_who_waits_for_a_store_that_hangs_ends_at_once(
    scene: Scene, kind: str, path: str, number: signal.Signals
) -> None:
    scene.store.inject(Plan(faults=["stall"], only=path.partition("/")[2] if kind != "stat" else "new"))
    with subprocess.Popen(
        [sys.executable, "-c", WAIT, kind, scene.mount.path / path], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"waiting\n"
            time.sleep(0.7)
            assert process.poll() is None
            began = time.monotonic()
            process.send_signal(number)
            assert process.wait(10) == (130 if number == signal.SIGINT else -number)
            assert time.monotonic() - began < 6
        finally:
            process.kill()


def test_a_defect_is_an_error_for_its_caller_alone_and_is_in_the_log(tmp_path: Path) -> None:
    models = tmp_path / "buckets/bucket/models"
    models.mkdir(parents=True)
    (models / "weights").write_bytes(b"weights")
    (models.parent / "unlisted").mkdir()
    (models.parent / "unlisted/file").touch()
    with (
        start_fast(tmp_path / "buckets") as server,
        mounted("s3://bucket", tmp_path / "mount", environment=server.environment()) as mount,
    ):
        have_serve(defective, mount, "s3://bucket")
        pid, began = mount.control()["server_pid"], time.monotonic()
        for act in ((mount.path / "models/weights").read_bytes, lambda: os.listdir(mount.path / "unlisted")):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                act()
        assert time.monotonic() - began < 12  # no retries, which go on for 15 s
        assert os.listdir(mount.path / "models") == ["weights"]
        assert mount.control()["server_pid"] == pid
        log = mount.log()
    for defect in ("TypeError: a defect of a sink", "LookupError: a defect of a store"):
        assert "Traceback (most recent call last):" in log
        assert defect in log
    assert "ERROR" in log
    assert "the answer is not from S3" not in log
