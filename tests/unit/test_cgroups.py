"""How much of its control groups' memory a server may lock."""

from pathlib import Path

import pytest

from trimsfs.tiers.host.cgroups import RESERVE, lockable_bytes

MIB = 1 << 20


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own"


def group(directory: Path, limit: str | int, *, name: str = "memory.max", anon: int = 0, locked: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(f"{limit}\n")
    prefix, used = ("", "anon") if name == "memory.max" else ("total_", "rss")
    (directory / "memory.stat").write_text(f"{prefix}{used} {anon}\n{prefix}unevictable {locked}\nfile 99999999999\n")


def test_the_closest_limit_above_counts(tmp_path: Path, own: Path) -> None:
    root = tmp_path / "cgroup"
    own.write_text("0::/pods/one\n")
    group(root / "pods/one", "max", anon=10 * MIB)
    group(root / "pods", 500 * MIB, anon=100 * MIB, locked=50 * MIB)
    assert lockable_bytes(root, own) == 350 * MIB - RESERVE
    group(root / "pods/one", 200 * MIB, anon=10 * MIB)
    assert lockable_bytes(root, own) == 190 * MIB - RESERVE


def test_the_first_version_of_control_groups(tmp_path: Path, own: Path) -> None:
    root = tmp_path / "cgroup"
    own.write_text("12:cpu,cpuacct:/other\n5:memory:/one\n0::/\n")
    group(root / "memory/one", 300 * MIB, name="memory.limit_in_bytes", anon=100 * MIB, locked=190 * MIB)
    assert lockable_bytes(root, own) == 0


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path, own: Path) -> None:
    root = tmp_path / "cgroup"
    own.write_text("0::/kubepods/pod1/container\n")  # of the host
    group(root, 300 * MIB)
    assert lockable_bytes(root, own) == 300 * MIB - RESERVE


@pytest.mark.parametrize("name", ["one\r", "one\x85two", "\udcff"])
def test_a_group_may_have_any_name_without_a_newline(tmp_path: Path, own: Path, name: str) -> None:
    root = tmp_path / "cgroup"
    own.write_bytes(f"5:cpu:/{name}\n0::/{name}\n".encode(errors="surrogateescape"))
    group(root / name, 300 * MIB)
    assert lockable_bytes(root, own) == 300 * MIB - RESERVE


@pytest.mark.parametrize("text", ["", "0::/one\n"])
def test_without_a_limit_all_may_be_locked(tmp_path: Path, own: Path, text: str) -> None:
    own.write_text(text)
    group(tmp_path / "cgroup/one", "max")
    assert lockable_bytes(tmp_path / "cgroup", own) is None
    assert lockable_bytes(tmp_path / "cgroup", tmp_path / "absent") is None
