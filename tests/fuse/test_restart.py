"""A server that dies or is replaced: whoever uses the mount waits for a moment, and goes on."""

import contextlib
import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.keepers import keeper, kill, serving
from tests.support.mounts import MountedStore, mountctl, mounted, trimsfs, wait_until
from tests.support.processes import alive, family
from tests.support.readers import Readers, Report
from tests.support.tmpfs import tmpfs
from trimsfs.mountinfo import mount_at

READERS = 8
SIZES = (3 << 20, 100_000, 20 << 20, 9 << 20, 1 << 20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several sizes, more than the cache is to hold."""
    draw, store = random.Random(1), tmp_path_factory.mktemp("store")
    for model in range(12):
        directory = store / f"group-{model % 3}/model-{model}"
        directory.mkdir(parents=True)
        for number, size in enumerate(SIZES):
            (directory / f"part-{number}").write_bytes(draw.randbytes(size + model))
    return store


@pytest.fixture
def busy(store: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """A mount whose cache holds a third of the store, so that files come and go all the time."""
    with mounted(store, tmp_path, "--cache-size", "150MiB", "--min-free", "0") as mount:
        yield mount


def shown(report: Report, what: str) -> None:
    worst = ", ".join(f"{kind} {seconds * 1e3:.0f} ms" for kind, seconds in sorted(report.worst_s.items()))
    print(f"{what}: {report.operations} operations by {READERS} readers; the longest: {worst}")


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_readers_of_a_server_that_is_killed_notice_nothing(
    kills: int, busy: MountedStore, store: Path, tmp_path: Path
) -> None:
    draw = random.Random(2)
    serving(busy)
    readers = Readers(busy.path, store, tmp_path, count=READERS)
    try:
        for number in range(kills):
            # Servers that end at once, again and again, are given up.
            time.sleep(draw.uniform(0.1, 1.0) if number % 3 else 1.2)
            serving(busy)
            kill(busy)
    finally:
        report = readers.stop()
    shown(report, f"{kills} kills")
    assert (report.errors, report.wrong) == ([], [])
    assert report.operations > 100
    assert keeper(busy)["restarts"] == kills
    assert "Traceback" not in busy.log()
    wait_until(lambda: zombies(int(str(keeper(busy)["keeper_pid"]))) == [])


def zombies(pid: int) -> list[int]:
    """The children of a process that have ended and that it has not taken note of."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if not alive(child)]


def titles(mount: MountedStore) -> dict[int, str]:
    """What ``ps`` shows of the keeper and everything below it, by process id."""
    found = {}
    for pid in family(int(str(keeper(mount)["keeper_pid"]))):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")
    return found


@pytest.mark.parametrize(("name", "shown"), [("plain", "plain"), ("odd\n) b\x1b[2J", r"odd\n) b\x1b[2J")])
def test_processes_say_what_they_are(name: str, shown: str, store_directory: Path, tmp_path: Path) -> None:
    mountpoint = f"{tmp_path}/{shown}/models"
    (tmp_path / name).mkdir()
    (store_directory / "model").write_bytes(b"weights")
    with mounted(store_directory, tmp_path / name) as mount:
        server = serving(mount)
        (mount.path / "model").read_bytes()
        before = titles(mount)
        roles = ("broker", "fetch", "keeper", "server", "spawner", "standby")
        assert sorted(before.values()) == [f"trimsfs {role} {mountpoint}" for role in roles]
        assert before[server] == f"trimsfs server {mountpoint}"
        (standby,) = (pid for pid, title in before.items() if title == f"trimsfs standby {mountpoint}")
        assert kill(mount) == standby
        after = sorted(f"trimsfs {role} {mountpoint}" for role in (*roles, "broker") if role != "fetch")
        wait_until(lambda: sorted(titles(mount).values()) == after, 30)  # a standby that was loaded has its own broker
        assert titles(mount)[standby] == f"trimsfs server {mountpoint}"
        assert Path(f"/proc/{standby}/comm").read_text().strip() == "trimsfs server"


def test_a_spawner_that_is_killed_is_followed_by_another(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(b"weights")
    with mounted(store_directory, tmp_path) as mount:
        server = serving(mount)
        (spawner,) = (pid for pid, title in titles(mount).items() if title.startswith("trimsfs spawner"))
        os.kill(spawner, signal.SIGKILL)
        serving(mount, not_by=server)
        assert (mount.path / "model").read_bytes() == b"weights"
        assert "the spawner has ended" in mount.log()


@pytest.mark.slow
def test_readers_of_a_server_that_is_replaced_notice_nothing(busy: MountedStore, store: Path, tmp_path: Path) -> None:
    serving(busy)
    readers = Readers(busy.path, store, tmp_path, count=READERS)
    try:
        for verb in ("upgrade", "restart", "upgrade"):
            before = serving(busy)
            time.sleep(0.5)
            done = mountctl(verb, busy.path)
            assert done.returncode == 0, done.stderr
            assert serving(busy) != before
    finally:
        report = readers.stop()
    shown(report, "3 replacements")
    assert (report.errors, report.wrong) == ([], [])
    assert keeper(busy)["last_end"] is None


def test_what_is_open_stays_open(store: Path, tmp_path: Path) -> None:
    name = "group-0/model-0/part-0"
    content = (store / name).read_bytes()
    with mounted(store, tmp_path, "--metadata-ttl", "3600") as mount:
        with (mount.path / name).open("rb", buffering=0) as file:
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            directory = os.open(mount.path / "group-0", os.O_RDONLY)
            names = os.listdir(directory)
            assert mount.info(name)["open"] == 1
            kill(mount)
            assert mount.info(name)["open"] == 1
            assert mount.info(name)["passthrough"]
            assert trimsfs("evict", mount.path / name).returncode == 12
            assert os.pread(file.fileno(), len(content), 0) == content == mapping[:]
            assert os.listdir(directory) == names
            os.close(directory)
            mapping.close()
        wait_until(lambda: mount.info(name)["open"] == 0)
        assert trimsfs("evict", mount.path / name).returncode == 0
        assert (mount.path / name).read_bytes() == content


def test_file_that_is_streamed_goes_on_where_it_was(store_directory: Path, streaming_mount: MountedStore) -> None:
    content = random.Random(3).randbytes(40 << 20)
    (store_directory / "big").write_bytes(content)
    with (streaming_mount.path / "big").open("rb", buffering=0) as file:
        for offset in range(0, len(content), 4 << 20):
            if offset % (16 << 20) == 0:
                kill(streaming_mount)
            assert os.pread(file.fileno(), 4 << 20, offset) == content[offset : offset + (4 << 20)]


def test_pins_and_what_is_resident_outlive_the_server(store: Path, tmp_path: Path) -> None:
    with mounted(store, tmp_path) as mount:
        model = mount.path / "group-0/model-0"
        assert trimsfs("pin", "--best-effort", model).returncode == 0
        fetched = mount.metrics()["trimsfs_fetch_fetched_bytes_total"]
        assert fetched > 0
        kill(mount)
        info = mount.info("group-0/model-0/part-0")
        assert (info["pinned"], info["passthrough"], info["verified"]) == (True, True, True)
        assert trimsfs("evict", model).returncode == 12
        (model / "part-0").read_bytes()
        assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == 0
        assert mount.control()["restarts"] == 1


def test_backing_files_of_evicted_models_are_given_up_after_a_restart(store: Path, tmp_path: Path) -> None:
    """An id that is left behind would keep the space of a file that has been removed."""
    with tmpfs(tmp_path / "cache", 1 << 30) as cache:
        cache.chmod(0o755)
        with mounted(store, tmp_path, "--min-free", "0") as mount:
            assert trimsfs("warm", mount.path).returncode == 0
            kill(mount)
            assert used(cache) > sum(SIZES) * 12
            assert trimsfs("evict", mount.path).returncode == 0
            wait_until(lambda: not list((cache / "blobs").glob("*/*")))
            wait_until(lambda: used(cache) - index_bytes(cache) < 1 << 20)


def index_bytes(cache: Path) -> int:
    """Bytes of the index, of whose journal the last few thousand changes stay."""
    return sum(path.stat().st_blocks * 512 for path in cache.glob("index.sqlite*"))


def used(directory: Path) -> int:
    """Bytes that a file system has in use."""
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_names_that_were_known_are_served_while_the_store_is_away(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").mkdir()
    (store_directory / "model/params").write_bytes(b"weights")
    with mounted(store_directory, tmp_path, "--metadata-ttl", "0.1") as mount:
        assert (mount.path / "model/params").read_bytes() == b"weights"
        store_directory.rename(tmp_path / "away")
        kill(mount)
        assert (mount.path / "model/params").read_bytes() == b"weights"
        (tmp_path / "away").rename(store_directory)


def test_server_that_ends_again_and_again_is_given_up(store_directory: Path, tmp_path: Path) -> None:
    """Whoever waits is told so: the mount goes away, and does not hang."""
    with mounted(store_directory, tmp_path) as mount:
        keeper_pid = int(str(keeper(mount)["keeper_pid"]))
        (store_directory / "new").write_bytes(bytes(256 << 20))  # more than a server gives before it is killed
        os.kill(serving(mount), signal.SIGSTOP)
        waiting = subprocess.Popen(["cat", mount.path / "new"], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 40
        while alive(keeper_pid) and time.monotonic() < deadline:
            for server in Path(f"/proc/{keeper_pid}/task/{keeper_pid}/children").read_text().split():
                with contextlib.suppress(ProcessLookupError):  # the keeper has collected it meanwhile
                    os.kill(int(server), signal.SIGKILL)
            time.sleep(0.02)
        assert not alive(keeper_pid)
        assert waiting.wait(10) != 0
        assert mount_at(mount.path) is None
        assert "giving up" in mount.log()
