"""How the commands ask mounts, of which some may hang."""

import errno
import os
import signal
import time
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path

import pytest

from tests.support.mounts import wait_until
from tests.support.processes import alive
from trimsfs.cli import control_client
from trimsfs.cli.control_client import ask_each, mount_over, read_json, read_lines, read_text
from trimsfs.cli.control_reader import MOST_OPENS
from trimsfs.errors import NotMountedError, NotPermittedError, ObjectChangedError
from trimsfs.mountinfo import Mount


def mount(name: str) -> Mount:
    return Mount(number=1, parent=1, mountpoint=Path(name), device="0:1", kind="fuse.trimsfs", source="s3://b")


def test_a_path_off_all_mounts_is_told_from_one_that_does_not_exist(tmp_path: Path) -> None:
    remedy = ": `trimsfs status` shows the mounts of this host"
    for path, problem in ((tmp_path, "is not on a trimsfs mount"), (tmp_path / "nope", "does not exist")):
        with pytest.raises(NotMountedError) as caught:
            mount_over(path)
        assert str(caught.value) == f"{path} {problem}{remedy}"


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
    monkeypatch.setattr(control_client, "STANDSTILL_S", 0.5)
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


class Replaced(RawIOBase):
    """A control file whose server is replaced after it has told *text*."""

    def __init__(self, text: bytes) -> None:
        self._text = BytesIO(text)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not (read := self._text.readinto(buffer)):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[BufferedReader]:
    """What the next opens of a file give; after them, the file itself."""
    real, left = Path.open, list[BufferedReader]()
    monkeypatch.setattr(Path, "open", lambda path, *how, **more: left.pop() if left else real(path, *how, **more))
    return left


def test_a_control_file_whose_server_is_replaced_is_read_from_the_next(
    tmp_path: Path, opens: list[BufferedReader]
) -> None:
    file = tmp_path / "control"
    file.write_text('{"a": 1}\n{"b": 2}\n')
    for told in (b"", b'{"a"'):
        opens += [BufferedReader(Replaced(told)) for _ in range(MOST_OPENS - 1)]
        assert read_json(file) == {"a": 1}
        assert opens == []
        opens += [BufferedReader(Replaced(told))]
        assert read_text(file) == file.read_text()


def test_lines_begin_anew_on_the_next_server_only_where_they_may(tmp_path: Path, opens: list[BufferedReader]) -> None:
    file = tmp_path / "warm"
    file.write_text('{"a": 1}\n{"b": 2}\n')
    opens += [BufferedReader(Replaced(b'{"a": 1}\n'))]
    lines = read_lines(file)
    assert next(lines) == {"a": 1}
    with pytest.raises(ObjectChangedError):
        next(lines)
    opens += [BufferedReader(Replaced(b'{"a": 1}\n'))]
    assert list(read_lines(file, again=True)) == [{"a": 1}, {"a": 1}, {"b": 2}]


def test_a_control_file_of_which_every_server_ends_is_an_error(tmp_path: Path, opens: list[BufferedReader]) -> None:
    opens += [BufferedReader(Replaced(b"")) for _ in range(MOST_OPENS)]
    with pytest.raises(ObjectChangedError):
        read_text(tmp_path / "control")
    assert opens == []


NAMES = ("hangs", "works", "private", "ends", "answers")
