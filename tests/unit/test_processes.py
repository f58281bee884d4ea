"""What is told of processes: in messages, and of this one."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import wait_until
from trimsfs.extras.gpu.holder_identity import holder_of
from trimsfs.processes import SHOWN, Usage, holders, process_of, shown, title_of


def test_who_uses_a_mount_is_named_or_that_it_is_not_known() -> None:
    own = f"pid {os.getpid()} ({title_of(os.getpid())})"
    assert str(Usage()) == "by a process that the kernel does not show"
    assert str(Usage(hidden=True)) == "by a process that only root can see"
    assert str(Usage(processes=[os.getpid()], hidden=True)) == f"by {own}"
    elsewhere = Usage(mounted=[(os.getpid(), Path("/bind")), (os.getppid(), Path("/other"))])
    there = f"the mount at /other in the mount namespace of {shown(os.getppid())}"
    assert str(elsewhere) == f"by the mount at /bind, {there}"
    layered = Usage(overlays=[(os.getpid(), Path("/merged")), (os.getppid(), Path("/other"))])
    assert str(layered) == f"by the overlay at /merged, {there.replace('mount', 'overlay', 1)}"
    many = str(Usage(processes=[os.getpid()] * (SHOWN + 3)))
    assert many == f"by {', '.join([own] * SHOWN)}, 3 more"


def test_a_process_is_named_by_its_program_and_one_that_has_ended_so() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        wait_until(lambda: title_of(process.pid) == "sleep")
        process.kill()
    assert title_of(process.pid) == "ended"


def test_the_container_of_a_process_is_named_as_engines_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    group = f"0::/machine.slice/libpod-{'0123456789ab' + 'c' * 52}.scope\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **_: group if path.name == "cgroup" else "llm\0")
    assert shown(7) == "pid 7 (llm\\x00, container 0123456789ab)"


def test_a_carriage_return_in_its_name_makes_no_process_pass_for_another() -> None:
    ready, script = (
        "import sys; print(flush=True); sys.stdin.read()",
        "open('/proc/self/comm', 'w').write('x\\rTgid:\\t1')",
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}; {ready}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process_of(process.pid) == process.pid == holder_of(0, process.pid).pid
        process.kill()


def test_who_has_a_file_with_a_carriage_return_in_its_name_mapped_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a\rb"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        status, mapping = os.fstat(file.fileno()), mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    assert os.getpid() in holders(device)[status.st_ino]
    mapping.close()
