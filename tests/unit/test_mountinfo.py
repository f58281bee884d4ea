from pathlib import Path

import pytest

from trimsfs.mountinfo import Mount, file_systems, mount_at, mount_of, mounts

ROOT = "21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"
PROC = "22 21 0:20 / /proc rw - proc proc rw"
MODELS = "40 21 0:51 / /mnt/models ro,nosuid shared:9 master:2 - fuse.trimsfs s3://models ro,user_id=0"


@pytest.fixture
def mountinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that is read in place of the kernel's."""
    file = tmp_path / "mountinfo"
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        assert path == Path("/proc/self/mountinfo")
        return read_bytes(file)

    monkeypatch.setattr(Path, "read_bytes", read)
    return file


def write(file: Path, *lines: str) -> None:
    file.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))


def test_mounts_of_trimsfs_are_found_with_optional_fields_or_without(mountinfo: Path) -> None:
    write(mountinfo, ROOT, PROC, MODELS, "41 21 0:52 / /m ro - fuse.trimsfs /srv/models ro")
    models = Path("/mnt/models")
    assert mounts() == [
        Mount(
            number=40,
            parent=21,
            mountpoint=models,
            device="0:51",
            kind="fuse.trimsfs",
            source="s3://models",
            shared=9,
            master=2,
        ),
        Mount(number=41, parent=21, mountpoint=Path("/m"), device="0:52", kind="fuse.trimsfs", source="/srv/models"),
    ]


@pytest.mark.parametrize(
    ("kind", "options", "user"),
    [
        ("fuse.trimsfs", "ro,user_id=1000,group_id=5,default_permissions", 1000),
        ("fuse.trimsfs", "ro", 0),
        ("fuse", "rw,user_id=7", 7),
        ("overlay", "rw,lowerdir=/a,user_id=7", 0),
    ],
)
def test_who_mounted_is_told_of_mounts_of_fuse(kind: str, options: str, user: int, mountinfo: Path) -> None:
    write(mountinfo, f"40 21 0:51 / /mnt/models ro - {kind} user_id=1 {options}")
    assert [mount.user for mount in mounts(None)] == [user]


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ("rw,lowerdir=/a/b:/c,upperdir=/u,workdir=/w", ["/a/b", "/c"]),
        (r"rw,lowerdir=/a\134:b\134\134:/c\134\054d\040e::/f,upperdir=/u", ["/a:b\\", "/c,d e", "/f"]),
        (r"rw,lowerdir+=/a:b,lowerdir+=/c\054d,datadir+=/e,xino=off", ["/a:b", "/c,d", "/e"]),
        ("rw,lowerdir=l/AB:/c", ["/c"]),
        ("rw,upperdir=/u", []),
    ],
    ids=["one option", "escaped", "an option each", "relative", "none"],
)
def test_the_lower_layers_of_an_overlay_are_told(options: str, layers: list[str], mountinfo: Path) -> None:
    write(mountinfo, f"40 21 0:51 / /merged rw - overlay overlay {options}", MODELS)
    assert [each.layers for each in mounts(None)] == [tuple(map(Path, layers)), ()]


def test_all_mounts_are_found_in_order(mountinfo: Path) -> None:
    write(mountinfo, ROOT, PROC, MODELS)
    assert [mount.kind for mount in mounts(None)] == ["ext4", "proc", "fuse.trimsfs"]


def test_octal_escapes_are_undone(mountinfo: Path) -> None:
    write(
        mountinfo,
        r"40 21 0:51 / /mnt/a\040b\011c\012d\134e - x ro - fuse.trimsfs /srv/my\040models ro".replace(" - x", ""),
    )
    (mount,) = mounts()
    assert mount.mountpoint == Path("/mnt/a b\tc\nd\\e")
    assert mount.source == "/srv/my models"


def test_an_escaped_backslash_before_digits_stays_one(mountinfo: Path) -> None:
    write(mountinfo, r"40 21 0:51 / /mnt/a\134040 ro - fuse.trimsfs s ro")
    assert mounts()[0].mountpoint == Path(r"/mnt/a\040")


def test_a_bind_tells_what_of_the_file_system_it_shows(mountinfo: Path) -> None:
    write(mountinfo, MODELS, r"41 21 0:51 /team/a\040b//deleted /mnt/b ro - fuse.trimsfs s3://models ro")
    assert [mount.root for mount in mounts()] == ["/", "/team/a b//deleted"]


def test_a_file_system_counts_once_by_the_mount_that_shows_all_of_it(mountinfo: Path) -> None:
    bind = "4{} 21 0:51 {} /mnt/{} ro - fuse.trimsfs s3://models ro"
    other = "50 21 0:52 /team /m ro - fuse.trimsfs /srv/models ro"
    write(mountinfo, bind.format(1, "/team", "a"), MODELS, bind.format(2, "/", "b"), other)
    assert [str(mount.mountpoint) for mount in file_systems()] == ["/mnt/models", "/m"]


def test_names_that_are_not_text_are_kept(mountinfo: Path) -> None:
    write(mountinfo, "40 21 0:51 / /mnt/\udcff ro - fuse.trimsfs s ro")
    assert bytes(mounts()[0].mountpoint) == b"/mnt/\xff"


def test_an_empty_source_is_understood(mountinfo: Path) -> None:
    write(mountinfo, "40 21 0:51 / /mnt/a ro - tmpfs  rw", MODELS)
    assert [mount.source for mount in mounts(None)] == ["", "s3://models"]


@pytest.mark.parametrize("separator", ["\r", "\x0c", "\x1c", "\x85", "\u2028"])
def test_only_a_newline_ends_a_line(mountinfo: Path, separator: str) -> None:
    write(mountinfo, f"39 21 0:50 / /mnt/a{separator}b rw - tmpfs tmpfs rw", MODELS)
    assert [mount.mountpoint for mount in mounts(None)] == [Path(f"/mnt/a{separator}b"), Path("/mnt/models")]


def test_the_uppermost_of_stacked_mounts_is_at_a_mount_point(mountinfo: Path) -> None:
    write(mountinfo, ROOT, MODELS, "41 40 0:52 / /mnt/models rw - tmpfs tmpfs rw")
    mount = mount_at(Path("/mnt/models"))
    assert mount is not None
    assert mount.kind == "tmpfs"


def test_nothing_is_at_a_path_below_a_mount_point(mountinfo: Path) -> None:
    write(mountinfo, ROOT, MODELS)
    assert mount_at(Path("/mnt/models/a")) is None


@pytest.mark.parametrize("path", ["/mnt/models", "/mnt/models/a/b"])
def test_a_path_lies_on_the_mount_above_it(mountinfo: Path, path: str) -> None:
    write(mountinfo, ROOT, MODELS)
    mount = mount_of(Path(path))
    assert mount is not None
    assert mount.mountpoint == Path("/mnt/models")


@pytest.mark.parametrize("path", ["/", "/mnt", "/mnt/models2", "/proc/self"])
def test_a_path_elsewhere_lies_on_no_mount_of_trimsfs(mountinfo: Path, path: str) -> None:
    write(mountinfo, ROOT, PROC, MODELS)
    assert mount_of(Path(path)) is None


def test_a_path_on_a_mount_inside_a_mount_lies_on_the_inner_one(mountinfo: Path) -> None:
    write(mountinfo, ROOT, MODELS, "41 40 0:52 / /mnt/models/tmp rw - tmpfs tmpfs rw")
    assert mount_of(Path("/mnt/models/tmp/x")) is None
    assert mount_of(Path("/mnt/models/x")) is not None


def test_a_path_lies_on_the_uppermost_of_stacked_mounts(mountinfo: Path) -> None:
    volume = "30 21 254:16 / /mnt/models rw - ext4 /dev/vdb rw"
    write(mountinfo, ROOT, volume, MODELS.replace("40 21", "40 30"))
    mount = mount_of(Path("/mnt/models/x"))
    assert mount is not None
    assert mount.kind == "fuse.trimsfs"


def test_a_path_on_what_covers_a_mount_does_not_lie_on_the_mount(mountinfo: Path) -> None:
    write(mountinfo, ROOT, MODELS, "41 40 0:52 / /mnt/models rw - tmpfs tmpfs rw")
    assert mount_of(Path("/mnt/models/x")) is None


def test_a_path_below_a_covered_mount_does_not_lie_on_what_is_hidden(mountinfo: Path) -> None:
    write(mountinfo, ROOT, MODELS, "41 21 0:52 / /mnt rw - tmpfs tmpfs rw")
    assert mount_of(Path("/mnt/models/x")) is None


def test_a_mount_on_what_covers_another_is_found(mountinfo: Path) -> None:
    cover = "41 21 0:52 / /mnt rw - tmpfs tmpfs rw"
    write(mountinfo, ROOT, MODELS, cover, MODELS.replace("40 21 0:51", "42 41 0:53"))
    mount = mount_of(Path("/mnt/models/x"))
    assert mount is not None
    assert mount.device == "0:53"


def test_the_order_of_lines_does_not_matter_to_where_a_path_lies(mountinfo: Path) -> None:
    """The kernel may list what was moved or propagated before its parent."""
    write(mountinfo, MODELS, PROC, ROOT)
    assert mount_of(Path("/mnt/models/x")) is not None


def test_a_root_that_is_its_own_parent_is_understood(mountinfo: Path) -> None:
    write(mountinfo, ROOT.replace("21 1 ", "21 21 "), MODELS)
    assert mount_of(Path("/mnt/models/x")) is not None
    assert mount_of(Path("/x")) is None


def test_a_covered_root_is_understood(mountinfo: Path) -> None:
    write(mountinfo, "1 1 0:1 / / rw - rootfs none rw", ROOT, MODELS)
    assert mount_of(Path("/mnt/models/x")) is not None


def test_mounts_are_found_where_the_root_is_no_mount_point(mountinfo: Path) -> None:
    """As in a chroot: the kernel lists only what lies below, with parents that it does not list."""
    write(mountinfo, PROC, MODELS, "43 21 0:54 / /m rw - tmpfs tmpfs rw")
    mount = mount_of(Path("/mnt/models/x"))
    assert mount is not None
    assert mount.mountpoint == Path("/mnt/models")
    assert mount_of(Path("/elsewhere")) is None


def test_the_kernels_own_list_is_understood() -> None:
    found = mounts(None)
    assert Path("/") in [mount.mountpoint for mount in found]
    assert Path("/proc") in [mount.mountpoint for mount in found]
