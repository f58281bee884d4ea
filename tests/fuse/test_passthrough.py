"""Files that are wholly here are read by the kernel alone."""

import hashlib
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.services.fast import start_fast
from tests.services.switch import switched
from tests.support.memory_group import memory_group
from tests.support.mounts import MountedStore, log_beside, mounted, trimsfs, umount, wait_until
from tests.support.processes import alive, mapped_bytes, run
from tests.support.tmpfs import tmpfs
from trimsfs import fuse
from trimsfs.tiers.host.page_cache import resident_bytes

MIB = 1 << 20
PROGRAMS = Path(__file__).parent
MODEL = random.Random(20).randbytes(40 * MIB + 12345)
LOCKS = ("--server-user", "root")
"""A server of another user locks no more than the limit of whoever mounts, where root may not raise that."""
WAITS = ("--cold-open", "wait")
"""Opens wait also while the machine stands still for a moment."""
READS = "trimsfs_files_reads_total"


@pytest.fixture
def mount(store_directory: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """A mount of a store with one model, in passthrough mode."""
    (store_directory / "model").write_bytes(MODEL)
    with mounted(store_directory, tmp_path, *WAITS) as mount:
        assert mount.control()["passthrough"] == {"used": True}
        yield mount


def test_server_sees_no_read_of_a_resident_file(mount: MountedStore) -> None:
    path = mount.path / "model"
    assert path.read_bytes() == MODEL
    for _ in range(3):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            assert mapping[:] == MODEL
    metrics = mount.metrics()
    assert metrics[READS] == 0
    assert metrics["trimsfs_files_cached_opens_total"] == 0
    assert metrics["trimsfs_files_passthrough_opens_total"] == 4
    assert mount.info("model")["passthrough"]


@contextmanager
def busy_processors() -> Iterator[None]:
    """A program that computes for each processor: one that idles is slow when it wakes, whatever it then does."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(program.wait)
            stack.callback(program.kill)
        yield


def test_open_of_a_resident_file_needs_no_turn_of_the_event_loop(mount: MountedStore) -> None:
    """A listing of attributes does, and takes little else: a quarter of what an open would that had one, too."""
    path, pid = mount.path / "model", mount.control()["server_pid"]

    def used_ns(operation: Callable[[], object]) -> int:
        schedstat = Path(f"/proc/{pid}/task/{pid}/schedstat")
        before = int(schedstat.read_text().split()[0])
        for _ in range(200):
            operation()
        return int(schedstat.read_text().split()[0]) - before

    path.read_bytes()
    opened, listed = [], []
    with busy_processors():
        for _ in range(20):  # in turns: the processor's speed is that of the moment
            opened.append(used_ns(lambda: os.close(os.open(path, os.O_RDONLY))))
            listed.append(used_ns(lambda: os.listxattr(path)))
    assert min(opened) < 3.2 * min(listed), (opened, listed)


def test_killing_the_server_does_not_disturb_a_reader_of_a_resident_file(mount: MountedStore) -> None:
    assert (mount.path / "model").read_bytes() == MODEL
    with (mount.path / "model").open("rb", buffering=0) as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        facts = mount.control()
        for who in ("keeper_pid", "server_pid"):  # and nobody goes on
            os.kill(facts[who], signal.SIGKILL)
        wait_until(lambda: not alive(facts["server_pid"]))
        assert mapping[:] == MODEL
        assert os.pread(file.fileno(), len(MODEL), 0) == MODEL
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as another:
            assert another[-1000:] == MODEL[-1000:]
        mapping.close()


def test_name_leads_to_the_same_file_before_and_after(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(MODEL)
    with mounted(store_directory, tmp_path, "--cold-open", "stream") as mount:
        path = mount.path / "model"
        with path.open("rb", buffering=0) as cold:
            before = os.fstat(cold.fileno())
            assert cold.read(10) == MODEL[:10]
            wait_until(lambda: mount.info("model")["passthrough"])
            with path.open("rb") as shared:
                assert shared.read() == MODEL
                assert os.path.sameopenfile(cold.fileno(), shared.fileno())
            # The handle of before goes on beside it.
            assert cold.read() == MODEL[10:]
        wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0)
        reads = mount.metrics()[READS]
        assert path.read_bytes() == MODEL
        assert mount.metrics()[READS] == reads
        assert os.path.samestat(before, path.stat())
        with os.scandir(mount.path) as entries:
            assert [entry.inode() for entry in entries] == [before.st_ino]


def test_an_eviction_leaves_no_page_of_a_file_read_in_cached_mode(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(MODEL)
    with mounted(store_directory, tmp_path, "--cold-open", "stream", "--prefetch", "off") as mount:
        path = mount.path / "model"
        with path.open("rb") as file:
            assert file.read() == MODEL
            wait_until(lambda: mount.info("model")["passthrough"] and resident_bytes(file.fileno()) == 0)

            def kept() -> bool:
                """Whether the kernel keeps every page that is read: it drops those of before twice, some time apart."""
                file.seek(0)
                assert file.read() == MODEL
                return (resident_bytes(file.fileno()) or 0) >= len(MODEL)

            wait_until(kept)
            inode = os.fstat(file.fileno()).st_ino
        assert trimsfs("evict", path).returncode == 0
        with path.open("rb") as file:
            assert os.fstat(file.fileno()).st_ino == inode
            assert resident_bytes(file.fileno()) == 0
            assert file.read() == MODEL
        assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == 2 * len(MODEL)
        wait_until(lambda: mount.info("model")["residency"]["disk"] == len(MODEL))


def test_the_last_close_of_a_streamed_file_leaves_one_copy_in_memory(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(MODEL)
    with mounted(store_directory, tmp_path, "--cold-open", "stream") as mount:
        path = mount.path / "model"
        # Neither opens the file nor lets the kernel give up the inode, and the pages with it.
        cold = os.open(path, os.O_PATH)
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
                assert mapping[:] == MODEL
                wait_until(lambda: mount.info("model")["passthrough"])
                with path.open("rb") as resident:
                    assert resident.read() == MODEL
                wait_until(lambda: resident_bytes(file.fileno()) == 0)  # what a mapping does not touch again is gone
                assert mapping[:] == MODEL
                assert (resident_bytes(file.fileno()) or 0) >= len(MODEL)
            wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0)
            # An open that keeps pages: the file is whole.
            with open(f"/proc/self/fd/{cold}", "rb") as again:
                wait_until(lambda: resident_bytes(again.fileno()) == 0)
                assert again.read() == MODEL
        finally:
            os.close(cold)


def test_a_file_that_another_displaced_is_complete_once_it_is_read_again(store_directory: Path, tmp_path: Path) -> None:
    """The kernel still has its pages from the first time: it must not read them in place of the server."""
    for name in ("model", "other"):
        (store_directory / name).write_bytes(MODEL)
    options = ["--cold-open", "stream", "--prefetch", "off", "--cache-size", str(len(MODEL) * 3 // 2)]
    with mounted(store_directory, tmp_path, *options) as mount:
        for name in ("model", "other", "model"):
            assert (mount.path / name).read_bytes() == MODEL
        wait_until(lambda: mount.info("model")["residency"]["disk"] == len(MODEL))
        assert mount.info("other")["residency"]["disk"] == 0


MAPS = textwrap.dedent(
    """
    import ctypes, hashlib, os, sys
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    fd = os.open(sys.argv[1], os.O_RDONLY)
    size = os.fstat(fd).st_size
    address = libc.mmap(None, size, 1, 1, fd, 0)
    os.close(fd)
    print("mapped", flush=True)
    sys.stdin.readline()
    print(hashlib.sha256(ctypes.string_at(address, size)).hexdigest(), flush=True)
    """
)
"""Maps a file and closes it, as loaders do: Python's mmap would keep a descriptor of its own."""


@contextmanager
def mapping(mount: MountedStore, name: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has a file mapped, and closed."""
    program: list[str | Path] = [sys.executable, "-c", MAPS, mount.path / name]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0)
        yield process
        process.kill()


def test_mapped_file_is_not_evicted_though_it_is_closed(mount: MountedStore) -> None:
    with mapping(mount, "model") as mapper:
        refused = trimsfs("evict", mount.path / "model")
        assert (refused.returncode, f"(used by pid {mapper.pid} (" in refused.stderr) == (12, True)
        os.kill(mount.control()["server_pid"], signal.SIGKILL)
        assert trimsfs("evict", mount.path / "model").returncode == 12
        output, _ = mapper.communicate("\n", timeout=30)
    assert output.strip() == hashlib.sha256(MODEL).hexdigest()
    wait_until(lambda: trimsfs("evict", mount.path / "model").returncode == 0)


def test_full_cache_evicts_others_than_a_mapped_file(store_directory: Path, tmp_path: Path) -> None:
    names = [f"model-{number}" for number in range(6)]
    for name in names:
        (store_directory / name).write_bytes(MODEL)
    options = ("--cache-size", "150MiB", "--min-free", "0", "--prefetch", "off", *WAITS)
    with mounted(store_directory, tmp_path, *options) as mount:
        for name in names[:3]:
            assert (mount.path / name).read_bytes() == MODEL
        with mapping(mount, names[0]):
            for name in [*names[1:], *names[1:]]:  # the mapped one is always the one used longest ago
                assert (mount.path / name).read_bytes() == MODEL
            assert mount.info(names[0])["residency"]["disk"] == len(MODEL)
            assert mount.metrics()["trimsfs_disk_refused_chunks_total"] == 0


def test_a_file_that_is_open_can_be_opened_after_its_cache_was_removed(mount: MountedStore) -> None:
    """The kernel has the old file open, and refuses another one for the same inode."""
    path, server = mount.path / "model", mount.control()["server_pid"]

    def replaced() -> bool:
        with suppress(OSError):  # ESTALE, if the server ended while its control file was open
            return bool(mount.control()["server_pid"] != server)
        return False

    assert path.read_bytes() == MODEL
    assert mount.info("model")["passthrough"]
    with path.open("rb") as held:
        for entry in mount.cache.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        wait_until(replaced)
        for _ in range(5):
            assert trimsfs("warm", path).returncode == 0
            assert path.read_bytes() == MODEL
        assert held.read() == MODEL
    wait_until(lambda: (trimsfs("warm", path).returncode, mount.info("model")["passthrough"]) == (0, True))
    assert path.read_bytes() == MODEL


def test_bind_mounted_file_is_served_before_and_after_an_eviction(mount: MountedStore, tmp_path: Path) -> None:
    """A bind mount of a file keeps the inode that it met: no lookup ever tells it of another."""
    target = tmp_path / "bound"
    target.touch()
    subprocess.run(["mount", "--bind", mount.path / "model", target], check=True, timeout=30)
    try:
        assert target.read_bytes() == MODEL  # bound while it was not here
    finally:
        umount(target)
    subprocess.run(["mount", "--bind", mount.path / "model", target], check=True, timeout=30)
    try:
        assert target.read_bytes() == MODEL  # bound while it was resident
        assert trimsfs("evict", mount.path / "model").returncode == 0
        assert target.read_bytes() == MODEL
    finally:
        umount(target)


def page_cache_bytes() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("\nCached:")[2].split()[0]) * 1024


@pytest.mark.alone  # measures the page cache of the host
def test_eight_processes_share_one_copy_in_memory(store_directory: Path, tmp_path: Path) -> None:
    size = 256 * MIB
    with (store_directory / "model").open("wb") as file:
        for seed in range(size // (32 * MIB)):
            file.write(random.Random(seed).randbytes(32 * MIB))
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with mounted(store_directory, tmp_path, *WAITS) as mount:
        before = page_cache_bytes()
        program = (
            "import mmap,sys,hashlib; f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=1);"
            "print(hashlib.sha256(m).hexdigest(),flush=True); sys.stdin.read()"
        )
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", program, mount.path / "model"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(8)
        ]
        digests = {reader.stdout.readline() for reader in readers if reader.stdout is not None}
        with (store_directory / "model").open("rb") as file:  # the store's own pages do not count
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        grown = page_cache_bytes() - before
        shares = [mapped_bytes(reader.pid, "model") for reader in readers]
        for reader in readers:
            reader.communicate(timeout=30)
        assert len(digests) == 1
        # What else happens on this host is not ours: a little is allowed for it.
        assert grown <= 1.02 * size + 8 * MIB
        assert sum(shares) <= 1.02 * size


def test_client_limited_below_the_size_of_the_file_maps_all_of_it(mount: MountedStore) -> None:
    assert trimsfs("warm", mount.path / "model").returncode == 0
    program = (
        "import mmap,os,sys,hashlib; open(sys.argv[2],'w').write(str(os.getpid()));"
        "f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=1); m.madvise(22);"  # MADV_POPULATE_READ
        "print(hashlib.sha256(m).hexdigest())"
    )
    with memory_group(24 * MIB) as processes:
        done = run(sys.executable, "-c", program, mount.path / "model", processes)
    assert done.stdout.strip() == hashlib.sha256(MODEL).hexdigest(), done.stderr


def test_an_open_that_waits_goes_on_after_a_stop(tmp_path: Path) -> None:
    (tmp_path / "buckets/bucket").mkdir(parents=True)
    (tmp_path / "buckets/bucket/model").write_bytes(b"weights")
    with (
        start_fast(tmp_path / "buckets") as server,
        switched(server) as (endpoint, switch),
        mounted("s3://bucket", tmp_path, "--cold-open", "wait", environment=endpoint.environment()) as mount,
    ):
        path = mount.path / "model"
        assert path.exists()
        switch.hold()
        with subprocess.Popen(["cat", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            time.sleep(0.5)
            for number in (signal.SIGSTOP, signal.SIGCONT):
                process.send_signal(number)
                time.sleep(0.5)
            assert process.poll() is None
            switch.let_go()
            assert process.communicate(timeout=30)[0] == b"weights"


def test_signal_ends_an_open_that_waits(store_directory: Path, tmp_path: Path) -> None:
    with (store_directory / "model").open("wb") as file:
        file.truncate(64 << 30)
    program = (
        "import os,signal,sys,time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(InterruptedError))\n"
        "print('opening', flush=True)\n"
        "try: os.open(sys.argv[1], os.O_RDONLY)\n"
        "except InterruptedError: print('interrupted', flush=True)\n"
    )
    with mounted(store_directory, tmp_path, "--cold-open", "wait", "--min-free", "0") as mount:
        process = subprocess.Popen(
            [sys.executable, "-c", program, mount.path / "model"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "opening\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR1)
        assert process.communicate(timeout=10)[0] == "interrupted\n"
        # Nobody waits for it any more.
        wait_until(lambda: mount.info("model")["open"] == 0)


@pytest.mark.parametrize("options", [["passthrough=no"], ["passthrough=yes"]])
def test_ioctl_tells_c_programs_what_is_here(store_directory: Path, tmp_path: Path, options: list[str]) -> None:
    (store_directory / "model").write_bytes(MODEL)
    header = Path(fuse.__file__).parent
    program = tmp_path / "residency"
    run("gcc", "-Wall", "-Wextra", "-Werror", f"-I{header}", "-o", program, PROGRAMS / "residency.c", check=True)
    with mounted(store_directory, tmp_path, *options, *WAITS) as mount:

        def residency() -> list[int]:
            return [int(word) for word in run(program, mount.path / "model", check=True).stdout.split()]

        size, disk, host, flags = residency()  # opening it fetches it
        assert (size, disk) == (len(MODEL), len(MODEL))
        assert host >= size
        assert flags == (1 if "passthrough=no" in options else 3)
        assert trimsfs("pin", "--best-effort", mount.path / "model").returncode == 0
        assert residency()[3] == flags | 4


def test_pinned_file_is_locked_in_memory_and_again_by_a_new_mount(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(MODEL)

    def locked(mount: MountedStore) -> int:
        status = Path(f"/proc/{mount.control()['server_pid']}/status").read_text()
        return int(status.partition("VmLck:")[2].split()[0]) * 1024

    with mounted(store_directory, tmp_path, *LOCKS) as mount:
        assert trimsfs("pin", "--best-effort", mount.path / "model").returncode == 0
        assert locked(mount) >= len(MODEL)
    with mounted(store_directory, tmp_path, *LOCKS) as mount:
        wait_until(lambda: mount.metrics()["trimsfs_host_locked_bytes"] == len(MODEL))
        assert locked(mount) >= len(MODEL)
        assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == 0
        assert trimsfs("unpin", mount.path / "model").returncode == 0
        assert locked(mount) == 0


def test_memory_budget_drops_what_was_used_longest_ago(store_directory: Path, tmp_path: Path) -> None:
    for name in "abc":
        (store_directory / name).write_bytes(random.Random(name).randbytes(16 * MIB))
    with mounted(store_directory, tmp_path, "--host-size", "32MiB", *WAITS) as mount:
        for name in "abc":
            assert (mount.path / name).read_bytes() == (store_directory / name).read_bytes()
        held = {name: mount.info(name)["residency"] for name in "abc"}
        assert held["a"] == {"disk": 16 * MIB, "host": 0, "gpu": {}}
        assert held["c"]["host"] == 16 * MIB
        assert mount.metrics()["trimsfs_host_used_bytes"] == 32 * MIB
        assert (mount.path / "a").read_bytes() == (store_directory / "a").read_bytes()
        assert mount.info("a")["residency"]["host"] == 16 * MIB


def test_cache_directory_in_memory_is_disk_and_host_tier_in_one(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(MODEL)
    with (
        tmpfs(tmp_path / "cache", 128 * MIB, more=",huge=always"),
        mounted(store_directory, tmp_path, "--min-free", "1MiB", *WAITS) as mount,
    ):
        assert mount.control()["passthrough"] == {"used": True}
        assert (mount.path / "model").read_bytes() == MODEL
        with (mount.path / "model").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            assert mapping[:] == MODEL
        assert mount.metrics()[READS] == 0


@contextmanager
def overlay(directory: Path, lower: Path) -> Iterator[Path]:
    """An overlay of its own over a directory, mounted for the length of the block."""
    for name in ("upper", "work", "merged"):
        (directory / name).mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={directory / 'upper'},workdir={directory / 'work'}"
    run("mount", "-t", "overlay", "-o", options, "overlay", directory / "merged", check=True)
    try:
        yield directory / "merged"
    finally:
        run("umount", "--lazy", directory / "merged", check=True)


def test_cache_directory_on_overlayfs_passes_through_and_on_two_of_them_does_not(
    store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "model").write_bytes(MODEL)
    for name in ("lower", "a", "b"):
        (tmp_path / name).mkdir()
    with overlay(tmp_path / "first", tmp_path / "lower") as first:
        with mounted(store_directory, tmp_path / "a", "--cache-dir", str(first / "cache"), *WAITS) as mount:
            assert mount.control()["passthrough"] == {"used": True}
            assert (mount.path / "model").read_bytes() == MODEL
            assert mount.metrics()[READS] == 0
            assert mount.info("model")["residency"]["host"] >= len(MODEL)
        with (
            overlay(tmp_path / "second", first) as second,
            mounted(store_directory, tmp_path / "b", "--cache-dir", str(second / "cache")) as mount,
        ):
            why = mount.control()["passthrough"]
            assert not why["used"]
            assert "--cache-dir" in why["reason"]
            assert why["reason"] in log_beside(tmp_path / "b").read_text()
            assert (mount.path / "model").read_bytes() == MODEL
