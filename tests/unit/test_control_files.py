"""How the commands ask mounts, of which some may hang."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.mounts import wait_until
from tests.support.processes import alive
from trimsfs.cli import control_files
from trimsfs.cli.control_files import ask_each
from trimsfs.errors import NotMountedError, NotPermittedError
from trimsfs.mountinfo import Mount


def mount(name: str) -> Mount:
    return Mount(number=1, parent=1, mountpoint=Path(name), device="0:1", kind="fuse.trimsfs", source="s3://b")


def ask(mount: Mount) -> int:
    """What is found out about a mount, by what its name says of it."""
    began = time.monotonic()
    match mount.mountpoint.name:
        case "hangs":
            time.sleep(60)
        case "works":
            while time.monotonic() < began + 1:
                pass
        case "private":
            raise NotPermittedError("private")
        case "ends":
            os._exit(1)
    return len(bytes(1 << 20))


def test_each_mount_answers_for_itself_and_none_that_hangs_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_files, "STANDSTILL_S", 0.5)
    began = time.monotonic()
    found = {mount.mountpoint.name: answer for mount, answer in ask_each([*map(mount, NAMES)], ask)}
    assert (found["works"], found["answers"]) == (1 << 20, 1 << 20)
    assert isinstance(found["private"], NotPermittedError)
    assert isinstance(found["hangs"], NotMountedError)
    assert str(found["hangs"]).startswith("hangs does not answer")
    assert "has ended" in str(found["ends"])
    assert time.monotonic() - began < 30


def test_who_asks_ends_with_the_command() -> None:
    receiver, sender = os.pipe()

    def tell(_: Mount) -> None:
        os.write(sender, f"{os.getpid()}".encode())
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        list(ask_each([mount("m")], tell))
        os._exit(0)
    asker = int(os.read(receiver, 16))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: not alive(asker))


NAMES = ("hangs", "works", "private", "ends", "answers")
