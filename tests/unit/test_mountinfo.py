import os
from pathlib import Path

import pytest

from trimsfs.mountinfo import Mount, file_systems, holding, mount_at, mount_of, mounts

ROOT = "21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"
PROC = "22 21 0:20 / /proc rw - proc proc rw"
MODELS = "40 21 0:51 / /mnt/models ro,nosuid shared:9 master:2 - fuse.trimsfs s3://models ro,user_id=0"
COVER = "41 40 0:52 / /mnt/models rw - tmpfs tmpfs rw"
VOLUME = "30 21 254:16 / /mnt/models rw - ext4 /dev/vdb rw"
ABOVE = "41 21 0:52 / /mnt rw - tmpfs tmpfs rw"


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
    ("line", "field", "value"),
    [
        (ROOT, "kind", "ext4"),
        (r"40 21 0:51 / /mnt/a\040b\011c\012d\134e ro - fuse.trimsfs s ro", "mountpoint", Path("/mnt/a b\tc\nd\\e")),
        (r"40 21 0:51 / /mnt/a\134040 ro - fuse.trimsfs s ro", "mountpoint", Path(r"/mnt/a\040")),
        ("40 21 0:51 / /mnt/\udcff ro - fuse.trimsfs s ro", "mountpoint", Path(os.fsdecode(b"/mnt/\xff"))),
        *(
            (f"39 21 0:50 / /mnt/a{end}b rw - tmpfs tmpfs rw", "mountpoint", Path(f"/mnt/a{end}b"))
            for end in ("\r", "\x0c", "\x1c", "\x85", "\u2028")  # only a newline ends a line
        ),
        (r"40 21 0:51 / /m ro - fuse.trimsfs /srv/my\040models ro", "source", "/srv/my models"),
        ("40 21 0:51 / /mnt/a ro - tmpfs  rw", "source", ""),
        (r"41 21 0:51 /team/a\040b//deleted /mnt/b ro - fuse.trimsfs s ro", "root", "/team/a b//deleted"),
        ("40 21 0:51 / /m ro - fuse.trimsfs user_id=1 ro,user_id=1000,group_id=5,default_permissions", "user", 1000),
        ("40 21 0:51 / /m ro - fuse.trimsfs user_id=1 ro", "user", 0),
        ("40 21 0:51 / /m ro - fuse user_id=1 rw,user_id=7", "user", 7),
        ("40 21 0:51 / /m ro - overlay user_id=1 rw,lowerdir=/a,user_id=7", "user", 0),
    ],
)
def test_a_field_of_a_line_is_understood(line: str, field: str, value: object, mountinfo: Path) -> None:
    write(mountinfo, line, MODELS)
    first, second = mounts(None)
    assert (getattr(first, field), second.device) == (value, "0:51")
    assert mount_at(first.mountpoint) == first
    assert holding(first.mountpoint / "x") == first


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


def test_at_a_mount_point_is_the_uppermost_of_stacked_mounts_and_nothing_below_it(mountinfo: Path) -> None:
    write(mountinfo, ROOT, MODELS, COVER)
    mount = mount_at(Path("/mnt/models"))
    assert mount is not None
    assert mount.kind == "tmpfs"
    assert mount_at(Path("/mnt/models/a")) is None


def test_a_file_system_counts_once_by_the_mount_that_shows_all_of_it(mountinfo: Path) -> None:
    bind = "4{} 21 0:51 {} /mnt/{} ro - fuse.trimsfs s3://models ro"
    other = "50 21 0:52 /team /m ro - fuse.trimsfs /srv/models ro"
    write(mountinfo, bind.format(1, "/team", "a"), MODELS, bind.format(2, "/", "b"), other)
    assert [str(mount.mountpoint) for mount in file_systems()] == ["/mnt/models", "/m"]


@pytest.mark.parametrize(
    ("lines", "on_mount", "elsewhere"),
    [
        ([ROOT, MODELS], ["/mnt/models", "/mnt/models/a/b"], []),
        ([ROOT, PROC, MODELS], [], ["/", "/mnt", "/mnt/models2", "/proc/self"]),
        ([ROOT, MODELS, COVER.replace("models rw", "models/tmp rw")], ["/mnt/models/x"], ["/mnt/models/tmp/x"]),
        ([ROOT, VOLUME, MODELS.replace("40 21", "40 30")], ["/mnt/models/x"], []),  # on what it covers
        ([ROOT, MODELS, COVER], [], ["/mnt/models/x"]),
        ([ROOT, MODELS, ABOVE], [], ["/mnt/models/x"]),
        # What was moved or propagated may be listed before its parent.
        ([MODELS, PROC, ROOT], ["/mnt/models/x"], []),
        ([ROOT.replace("21 1 ", "21 21 "), MODELS], ["/mnt/models/x"], ["/x"]),  # a root that is its own parent
        (["1 1 0:1 / / rw - rootfs none rw", ROOT, MODELS], ["/mnt/models/x"], []),
        # In a chroot, only what lies below is listed, with parents that are not.
        ([PROC, MODELS, "43 21 0:54 / /m rw - tmpfs tmpfs rw"], ["/mnt/models/x"], ["/elsewhere"]),
    ],
)
def test_a_path_lies_on_the_mount_that_the_kernel_would_reach(
    mountinfo: Path, lines: list[str], on_mount: list[str], elsewhere: list[str]
) -> None:
    write(mountinfo, *lines)
    found = [mount_of(Path(path)) for path in on_mount]
    assert [mount and (mount.device, mount.mountpoint) for mount in found] == [
        ("0:51", Path("/mnt/models")) for _ in on_mount
    ]
    assert [mount_of(Path(path)) for path in elsewhere] == [None for _ in elsewhere]


def test_a_mount_on_what_covers_another_is_found(mountinfo: Path) -> None:
    write(mountinfo, ROOT, MODELS, ABOVE, MODELS.replace("40 21 0:51", "42 41 0:53"))
    mount = mount_of(Path("/mnt/models/x"))
    assert mount is not None
    assert mount.device == "0:53"
