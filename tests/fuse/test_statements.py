"""Statements of docs/semantics.md on what happens when all that serves a mount is gone, or some of it."""

import errno
import faulthandler
import mmap
import os
import random
import signal
from pathlib import Path

import pytest

from tests.support.keepers import kill
from tests.support.mounts import MountedStore, again_while_copied, mounted, trimsfs, wait_until
from trimsfs.mountinfo import mount_at

MIB = 1 << 20


def test_a_command_of_a_server_that_is_gone_has_ended(store_directory: Path, streaming_mount: MountedStore) -> None:
    """Who reads on is told so."""
    (store_directory / "model").write_bytes(random.Random(1).randbytes(3 * MIB))
    with (streaming_mount.path / ".trims/model/warm-disk").open("rb", buffering=0) as command:
        assert command.read(1 << 16)
        kill(streaming_mount)
        with pytest.raises(OSError, match="Stale file handle") as caught:
            command.read(1 << 16)
        assert caught.value.errno == errno.ESTALE
    done = trimsfs("warm", streaming_mount.path / "model")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", ["passthrough=yes", "passthrough=no"])
def test_a_mount_whose_processes_are_all_killed_says_so_until_it_is_unmounted(
    mode: str, store_directory: Path, tmp_path: Path
) -> None:
    """What is passed through goes on being read; other mappings fault where nothing is in memory."""
    content = random.Random(2).randbytes(4 * MIB)
    (store_directory / "model").write_bytes(content)
    with mounted(store_directory, tmp_path, mode, "--cold-open", "wait") as mount:
        file = os.open(mount.path / "model", os.O_RDONLY)
        mapping = mmap.mmap(file, 0, prot=mmap.PROT_READ)
        passed = mount.info("model")["passthrough"]
        facts = mount.control()
        for who in ("keeper_pid", "server_pid"):
            os.kill(facts[who], signal.SIGKILL)
        wait_until(lambda: not_connected(mount.path / "other"))
        assert passed == (mode == "passthrough=yes")
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        if passed:
            assert mapping[:] == content == os.pread(file, len(content), 0)
        else:
            assert not_connected(mount.path / "model")
            assert faults(mapping)
        mapping.close()
        os.close(file)
        assert again_while_copied(lambda: trimsfs("umount", mount.path)).returncode in {0, 10}
        assert mount_at(mount.path) is None


def not_connected(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def faults(mapping: mmap.mmap) -> bool:
    """Whether a page that is in no memory faults, in another process."""
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            mapping.madvise(mmap.MADV_DONTNEED)
            _ = mapping[0]
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
