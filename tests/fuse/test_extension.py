"""The extension over libfuse: clean to a strict compiler and to the address sanitizer."""

import os
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from tests.support.mounts import MountedStore, unmount, wait_until
from tests.support.processes import run
from tests.support.sanitizers import SANITIZE, reported, sanitized
from trimsfs import fuse

SOURCE = Path(fuse.__file__).with_name("_libfuse.c")
ROOT = SOURCE.parents[2]
STRICT = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]


def flags() -> list[str]:
    done = run("pkg-config", "--cflags", "fuse3", check=True)
    return [f"-I{sysconfig.get_paths()['include']}", *shlex.split(done.stdout)]


@pytest.mark.parametrize("source", [SOURCE, *sorted((ROOT / "trimsfs/client").glob("*.c"))], ids=lambda path: path.name)
def test_what_is_in_c_compiles_without_a_warning(source: Path, tmp_path: Path) -> None:
    done = run("gcc", *STRICT, *flags(), "-O2", "-fPIC", "-c", source, "-o", tmp_path / "object.o", timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def scan_damaged(tmp_path: Path, count: int, timeout_s: float) -> None:
    """The scanner of MXNet's files, built for the address sanitizer, is given so many damaged ones."""
    library, log = tmp_path / "params.so", tmp_path / "sanitizer"
    source = ROOT / "trimsfs/client/_params.c"
    subprocess.run(["gcc", *SANITIZE, "-fPIC", "-shared", source, "-o", library], timeout=120, check=True)
    command = (sys.executable, "-m", "tests.fuzz.params", library, f"--count={count}")
    done = run(*command, cwd=ROOT, env=sanitized(log), timeout=timeout_s)
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 < int(done.stdout.split()[0]) < count  # the original, and some that are well still
    assert reported(tmp_path) == ""


def test_a_few_damaged_files_for_the_scanner(tmp_path: Path) -> None:
    scan_damaged(tmp_path, 20_000, timeout_s=60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_damaged_files_for_the_scanner(tmp_path: Path) -> None:
    scan_damaged(tmp_path, 1_000_000, timeout_s=1100)


def test_extension_is_clean_to_the_address_sanitizer(store_directory: Path, tmp_path: Path) -> None:
    """A whole mount with an extension built for it: opens, ioctl, listing, eviction."""
    content = random.Random(3).randbytes(9 << 20)
    (store_directory / "model").write_bytes(content)
    copy, mountpoint, log = tmp_path / "copy", tmp_path / "models", tmp_path / "sanitizer"
    shutil.copytree(ROOT / "trimsfs", copy / "trimsfs", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    mountpoint.mkdir()
    target = copy / "trimsfs/fuse" / f"_libfuse{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        ["gcc", *SANITIZE, *flags(), "-fPIC", "-shared", SOURCE, "-o", target, "-lfuse3"], timeout=120, check=True
    )
    environment = sanitized(log) | {"PYTHONPATH": f"{copy}:{ROOT}", "TRIMSFS_CONFIG": "/dev/null"}

    def command(*arguments: str | Path) -> None:
        subprocess.run([sys.executable, "-m", "trimsfs", *arguments], env=environment, timeout=120, check=True)

    command("mount", mountpoint, "--store", store_directory, "--cache-dir", tmp_path / "cache")
    try:
        pid = MountedStore(mountpoint, tmp_path / "cache").control()["server_pid"]
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert str(target) in maps
        assert "libasan" in maps
        for _ in range(3):
            assert (mountpoint / "model").read_bytes() == content
            assert [path.name for path in mountpoint.iterdir()] == ["model"]
            command("evict", mountpoint / "model")
        program = "import fcntl,os,sys; f=os.open(sys.argv[1],0); fcntl.ioctl(f, 0x80207470, bytearray(32))"
        subprocess.run([sys.executable, "-c", program, mountpoint / "model"], timeout=30, check=True)
    finally:
        unmount(mountpoint)
    assert reported(tmp_path) == ""


@pytest.mark.alone  # its namespace holds copies of others' mounts
def test_without_privilege_in_the_first_user_namespace_a_mount_works_in_cached_mode(
    store_directory: Path, tmp_path: Path
) -> None:
    content = random.Random(4).randbytes(9 << 20)
    (store_directory / "model").write_bytes(content)
    mountpoint, cache, log = tmp_path / "models", tmp_path / "cache", tmp_path / "log"
    mountpoint.mkdir()
    script = textwrap.dedent(
        f"""
        set -e
        {sys.executable} -m trimsfs mount {mountpoint} --store {store_directory} --cache-dir {cache} --log-file {log}
        trap "{sys.executable} -m trimsfs umount {mountpoint}" EXIT
        cmp {mountpoint}/model {store_directory}/model
        cmp {mountpoint}/model {store_directory}/model
        cat {mountpoint}/.trims/control
        """
    )
    environment = os.environ | {"TRIMSFS_CONFIG": "/dev/null"}
    done = run("unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, env=environment)
    if "unshare failed" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert '"passthrough": {"used": false, "reason": "passthrough needs CAP_SYS_ADMIN: mount as root"}' in done.stdout
    wait_until(lambda: "cached mode: passthrough needs CAP_SYS_ADMIN" in log.read_text())
    assert log.read_text().count("cached mode") == 1
