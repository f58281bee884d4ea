"""Owner, group and mode by path, and who may read what."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.errors import ConfigurationError
from trimsfs.namespace.permissions import Ownership, Permissions
from trimsfs.options import MountOptions, load_options


def access(*rules: dict[str, object], **options: object) -> Permissions:
    values = {"uid": 10, "gid": 20, "mode": 0o444, "dir_mode": 0o555, "access": rules} | options
    return Permissions(MountOptions.model_validate(values))


def test_without_rules_all_is_as_the_mount() -> None:
    plain = access()
    assert plain.of("a/b", directory=False) == Ownership(10, 20, 0o444)
    assert plain.of("a/", directory=True) == Ownership(10, 20, 0o555)
    assert plain.may_read("a/b", 99, set())


def test_a_rule_holds_for_a_path_and_all_below() -> None:
    ruled = access({"path": "tenant-a", "gid": 7, "mode": "0440"})
    for path, directory in (("tenant-a", True), ("tenant-a/", True), ("tenant-a/deep/er", True)):
        assert ruled.of(path, directory=directory) == Ownership(10, 7, 0o550)
    assert ruled.of("tenant-a/model/params", directory=False) == Ownership(10, 7, 0o440)
    for path in ("tenant-ab/x", "other/tenant-a/x", "tenant", ""):
        assert ruled.of(path, directory=False) == Ownership(10, 20, 0o444)


def test_later_rules_win_and_leave_what_they_do_not_say() -> None:
    ruled = access(
        {"path": "*", "mode": "0400", "uid": 1}, {"path": "a/*.txt", "mode": "0444"}, {"path": "a", "gid": 3}
    )
    assert ruled.of("a/x.txt", directory=False) == Ownership(1, 3, 0o444)
    assert ruled.of("a/x.bin", directory=False) == Ownership(1, 3, 0o400)
    assert ruled.of("a/b/x.txt", directory=False) == Ownership(1, 3, 0o400)


@pytest.mark.parametrize(
    ("uid", "groups", "may"),
    [(0, set(), True), (10, set(), True), (99, {7}, True), (99, {20}, False), (99, {5}, True), (99, set(), False)],
)
def test_who_may_read_is_who_the_kernel_lets(uid: int, groups: set[int], may: bool) -> None:
    ruled = access({"path": "secret", "gid": 7, "mode": "0440"}, control_gid=5)
    assert ruled.may_read("secret/model/params", uid, groups) == may


def test_a_directory_that_may_not_be_searched_hides_what_is_open_below() -> None:
    ruled = access({"path": "hidden", "dir_mode": "0500"}, {"path": "hidden/open", "mode": "0444", "dir_mode": "0555"})
    assert ruled.of("hidden/open/file", directory=False).mode == 0o444
    assert not ruled.may_read("hidden/open/file", 99, {1})


@given(mode=st.integers(0, 0o777), uid=st.sampled_from([1, 2]), group=st.sampled_from([3, 4]), bits=st.integers(1, 7))
def test_permissions_are_those_of_the_first_class_that_fits(mode: int, uid: int, group: int, bits: int) -> None:
    granted = Ownership(1, 3, mode).grants(bits, uid, {group})
    owner, members, others = mode >> 6 & 7, mode >> 3 & 7, mode & 7
    assert granted == ((owner if uid == 1 else members if group == 3 else others) & bits == bits)


def loaded(tmp_path: Path, text: str) -> MountOptions:
    file = tmp_path / "mount.toml"
    file.write_text(text)
    return load_options({}, configs=[file], environment={})


def test_rules_and_tenants_are_tables_of_a_file(tmp_path: Path) -> None:
    options = loaded(
        tmp_path,
        """
        cache_size = "10GiB"
        [[access]]
        path = "/tenant-a/"
        gid = 2001
        mode = "0440"
        [[tenants]]
        path = "tenant-a"
        cache_size = "4GiB"
        """,
    )
    assert (options.access[0].path, options.access[0].mode) == ("tenant-a", 0o440)
    assert options.tenants[0].cache_size == 4 << 30
    assert MountOptions.model_validate(options.model_dump(mode="json")) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[access]]\npath = "a"\nmode = 440', 'write it as text, such as "0444"'),
        ('[[access]]\npath = "a"\nmode = "999"', "access"),
        ('[[access]]\npath = "../a"', "is not a path below the mount point"),
        ("[[access]]\ngid = 5", "[[access]] number 1 in"),
        ('[[tenants]]\npath = "a"\nsize = "1GiB"', "there is no such option"),
        ('[[tenants]]\npath = "a"\ncache_size = "much"', "is not a size such as 10GiB"),
        ('cache_size = "1GiB"\n[[tenants]]\npath = "a"\ncache_size = "2GiB"', "add up to"),
    ],
)
def test_what_cannot_be_meant_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        loaded(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
