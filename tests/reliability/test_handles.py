"""What programs have open in every way that there is, while nobody else knows of it any more."""

import hashlib
import json
import mmap
import os
import random
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.reliability.processes import stacks
from tests.reliability.sharer import KINDS
from tests.support.keepers import kill, serving
from tests.support.mounts import MountedStore, mounted, wait_until
from tests.support.survival import Survived

SHARER = Path(__file__).with_name("sharer.py")
FAULT_THREADS = Path(__file__).parents[1] / "support/fault_threads.py"
MODEL = random.Random(21).randbytes(17 << 20)
THREADS = 64
OPENERS, DEATHS = 16, 2
TIMES, AT_ONCE = 50, 10
"""Files that are mapped by one process after the other."""
LIMIT_S = 60.0


def evicted(mount: MountedStore) -> int:
    """How many files can be evicted now; none that is open."""
    last = json.loads((mount.path / ".trims/.trims/evict").read_bytes().splitlines()[-1])
    assert last["state"] == "done" or last["kind"] == "InUseError", last
    return int(last["total_files"] - last["failed_files"])


@pytest.mark.parametrize("options", [("wait", "passthrough=yes"), ("stream", "passthrough=no")], ids=" ".join)
def test_what_is_open_is_open_for_whoever_has_it(
    options: tuple[str, str], store_directory: Path, tmp_path: Path, survived: Survived
) -> None:
    """The server is killed while nobody but these knows of the files."""
    digest = hashlib.sha256(MODEL).hexdigest()
    for kind in KINDS:
        (store_directory / kind).write_bytes(MODEL)
    with mounted(store_directory, tmp_path, "--cold-open", *options) as mount, ExitStack() as stack:
        programs = []
        for kind in KINDS:
            command = [sys.executable, str(SHARER), kind, str(mount.path / kind)]
            program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(program.communicate)
            stack.callback(program.kill)
            programs.append(program)
        for program in programs:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
        assert evicted(mount) == 0
        kill(mount)
        assert evicted(mount) == 0
        wrong = 0
        for program in programs:
            told = program.communicate("go\n\n", timeout=LIMIT_S)[0].split()
            wrong += told[-2:] != [digest, digest]
        wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0)
        assert evicted(mount) == len(KINDS)
    survived(
        f"handles forked, inherited, sent; {' '.join(options)}",
        injected=len(KINDS) + 1,
        operations=2 * len(KINDS),
        wrong=wrong,
    )


def test_many_threads_open_and_close_while_files_are_evicted_and_servers_die(
    store_directory: Path, tmp_path: Path, survived: Survived
) -> None:
    """No open fails, and no server keeps a file for one that nobody has."""
    sizes = [50_000, 50_001, 50_002, 400_000, 1_600_000, 6_400_000]
    contents = {f"m{number}": random.Random(number).randbytes(size) for number, size in enumerate(sizes)}
    for name, content in contents.items():
        (store_directory / name).write_bytes(content)
    stop, wrong, opens = threading.Event(), list[str](), [0] * OPENERS
    with mounted(store_directory, tmp_path) as mount:

        def open_and_close(index: int) -> None:
            draw = random.Random(index)
            while not stop.is_set():
                name = draw.choice(list(contents))
                try:
                    descriptor = os.open(mount.path / name, os.O_RDONLY)
                    if draw.random() < 0.5:
                        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapping:
                            right = mapping[:] == contents[name]
                    else:
                        right = os.pread(descriptor, len(contents[name]) + 1, 0) == contents[name]
                    if not right:
                        wrong.append(name)
                    os.close(descriptor)
                except OSError as error:
                    wrong.append(f"{name}: {error}")
                opens[index] += 1

        threads = [threading.Thread(target=open_and_close, args=(index,)) for index in range(OPENERS)]
        for thread in threads:
            thread.start()
        gone = 0
        for _ in range(DEATHS):
            before, served = gone, sum(opens)
            wait_until(lambda served=served: sum(opens) > served + 500)  # type: ignore[misc]
            while gone < before + 5:
                gone += evicted(mount)
                (mount.path / ".trims/m5/warm-host").read_bytes()
            serving(mount)
            kill(mount)
        stop.set()
        for thread in threads:
            thread.join(LIMIT_S)
        assert wrong == []
        wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0)
        for name in contents:
            (mount.path / name).read_bytes()
        wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0)
        assert evicted(mount) == len(contents)
    survived(
        "kills and evictions while 16 threads open and close",
        injected=DEATHS + gone,
        operations=sum(opens),
        wrong=len(wrong),
    )


@pytest.mark.parametrize("mode", ["passthrough=yes", "passthrough=no"])
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_cold_mappings_faulted_by_64_threads_never_hang(
    mode: str, store_directory: Path, tmp_path: Path, survived: Survived
) -> None:
    draw, wrong = random.Random(22), 0
    options = ("--cold-open", "stream", "--metadata-ttl", "0", "--cache-size", "200MiB", mode)
    with mounted(store_directory, tmp_path, *options) as mount:
        for number in range(TIMES):
            directory = store_directory / str(number)
            directory.mkdir()
            wanted = []
            for name in range(AT_ONCE):
                content = draw.randbytes((9 << 20) + name)
                (directory / str(name)).write_bytes(content)
                wanted.append(hashlib.sha256(content).hexdigest())
            wrong += faulted(mount, [mount.path / str(number) / str(name) for name in range(AT_ONCE)]) != wanted
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()
        wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0)
    survived(
        f"cold mappings faulted by {THREADS} threads, {mode}",
        injected=TIMES * AT_ONCE,
        operations=TIMES * AT_ONCE * THREADS,
        wrong=wrong,
    )


def faulted(mount: MountedStore, paths: list[Path]) -> list[str]:
    """What threads see of files that they map at once, by SHA-256; where everybody waits, if they hang."""
    command = [sys.executable, str(FAULT_THREADS), str(THREADS), *map(str, paths)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told, failed = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        server = serving(mount)
        raise AssertionError(f"they hang:\n{stacks(process.pid)}\nthe server:\n{stacks(server)}") from None
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, failed
    return told.split()
