"""Names that are chosen to be taken for something else: by the file system, a log, a terminal or a program."""

import errno
import json
import os
import pty
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.hostile import Told, hostile_store
from tests.security.names import FILES, FORGED, HIDDEN, LOUD, check_log
from tests.services import put
from tests.services.ceph import Ceph
from tests.support.mounts import MOUNTCTL, TRIMSFS, MountedStore, mounted, trimsfs
from tests.support.survival import Survived


def content(name: str) -> bytes:
    return random.Random(name).randbytes(1000)


def walked(mount: Path) -> dict[str, bytes]:
    """All files of a mount and their bytes."""
    return {str(path.relative_to(mount)): path.read_bytes() for path in mount.rglob("*") if path.is_file()}


def test_keys_are_files_of_their_own_or_hidden(ceph: Ceph, bucket: str, tmp_path: Path, survived: Survived) -> None:
    """Of a real server. No key leads anywhere but to itself."""
    below = ["a//b", "a/../b", "a/./b", ".trims/models", "dir/.trims/dir/pin", "/lead", "../../etc/passwd"]
    nested = "d/" * 20 + "deep"
    put(ceph, bucket, {name: content(name) for name in (*FILES, *HIDDEN, *below, nested)})
    with mounted(f"s3://{bucket}", tmp_path, environment=ceph.environment()) as mount:
        found = walked(mount.path)
        wrong = sum(found[name] != content(name) for name in found)

        assert set(found) == {*FILES, nested}
        assert trimsfs("warm", mount.path).returncode == 0
        assert json.loads((mount.path / ".trims/control").read_text())["mountpoint"] == str(mount.path)
        assert mount.metrics()["trimsfs_names_hidden_keys"] >= len(HIDDEN)
        check_log(mount.log())
    assert not Path("/owned").exists()
    survived("hostile keys", injected=len(FILES) + len(below), operations=len(found), wrong=wrong)


def test_files_of_a_directory_may_have_any_name(store_directory: Path, tmp_path: Path) -> None:
    """Also such as no text has."""
    names = [*map(os.fsencode, FILES), b"\xff\xfe not UTF-8 \x80", bytes(range(1, 47))]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(store_directory), name))).write_bytes(name)
    with mounted(store_directory, tmp_path) as mount:
        directory = os.fsencode(mount.path)
        assert sorted(os.listdir(directory)) == sorted(names)
        for name in names:
            assert Path(os.fsdecode(os.path.join(directory, name))).read_bytes() == name
            assert mount.info(os.fsdecode(name))["size"] == len(name)
        assert len(json.loads((mount.path / ".trims/models").read_text())["models"]) == len(names)
        assert len(mount.metrics()) > 20
        check_log(mount.log())


DEFECT = """
import logging, sys
from trimsfs.server.startup import _configure_logging
from trimsfs.options import MountOptions
_configure_logging(MountOptions())
try:
    raise ValueError(sys.argv[1])
except ValueError:
    logging.getLogger("trimsfs.test").exception("%s", sys.argv[1], stack_info=True)
raise RuntimeError(sys.argv[1])
"""


def test_a_traceback_in_the_log_forges_no_line() -> None:
    """Neither of an error that is logged nor of one that ends the server."""
    done = subprocess.run(
        [sys.executable, "-c", DEFECT, LOUD[0]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("forged") >= 3
    check_log(done.stderr)


def shown(*command: str | Path) -> bytes:
    """What a command writes to a terminal."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "TRIMSFS_CONFIG": "/dev/null", "COLUMNS": "500", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment)
    os.close(end)
    text = b""
    try:
        while piece := os.read(terminal, 1 << 16):
            text += piece
    except OSError:
        pass  # nobody has the other end
    finally:
        os.close(terminal)
        process.wait(60)
    return text


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount of objects with loud names, that tells all it may of how the store fails, in words of its own."""
    said = f"because\n{FORGED}\r&#10;{FORGED}"
    body = f"<Error><Code>Internal\n{FORGED}</Code><Message>{said}</Message></Error>".encode()
    options = ("--log-level", "debug", "--retry-deadline", "0.1", "--cold-open", "stream")
    directory = tmp_path_factory.mktemp("failing") / "mount"
    with (
        hostile_store({os.fsencode(name): Told(content=b"x") for name in LOUD}) as store,
        mounted(store.url, directory, *options, environment=store.server.environment()) as mount,
    ):
        os.listdir(mount.path)
        store.answer = lambda method, key, _: (500, {}, body) if key and method == "GET" else None
        yield mount


def test_no_name_forges_a_line_of_the_log(failing: MountedStore, survived: Survived) -> None:
    errors: Counter[str] = Counter()
    for name in LOUD:
        try:
            (failing.path / name).read_bytes()
        except OSError as error:
            errors[errno.errorcode[error.errno or 0]] += 1
    assert "forged" in failing.log()
    check_log(failing.log())
    survived(
        "names that forge log lines", injected=len(LOUD), operations=errors.total(), errors=errors, allowed=["EIO"]
    )


def test_no_name_does_anything_to_a_terminal(failing: MountedStore, tmp_path: Path) -> None:
    paths = [failing.path / name for name in LOUD]
    absent = failing.path / "absent\x1b]0;title\x07"
    texts = [
        shown(TRIMSFS, "ls", "--files", failing.path),
        shown(TRIMSFS, "warm", "--", *paths),
        shown(TRIMSFS, "umount", absent),
        shown(TRIMSFS, "mount", tmp_path / LOUD[2], "--store", tmp_path / f"absent-{LOUD[0]}"),
        shown(MOUNTCTL, "attach", str(os.getpid()), absent),
    ]
    for text in texts:
        assert text
        for hostile in (b"\x1b]0;", b"\x1b[41;93m", b"\x07", "\u202e".encode(), "\u2028".encode(), "\x85".encode()):
            assert hostile not in text, text
        assert not re.search(rb"[\r\n]2026-01-02", text), text
    check_log(failing.log())
