"""``trimsfs image``: Linux mounts what it writes, and finds the names, attributes and bytes of the mount."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.images.trees import TIMEOUT_S, RandomTree, found, mounted_image
from tests.support.mounts import MountedStore, mounted, trimsfs
from tests.support.versions import in_directory, move, publish
from trimsfs.exit_codes import exit_code

CHUNK = 2 << 20
FILES = {
    "llama/model-1.safetensors": random.Random(1).randbytes(3 * CHUNK + 12_345),
    "llama/model-2.safetensors": random.Random(2).randbytes(CHUNK),
    "llama/model-3.safetensors": random.Random(3).randbytes(CHUNK - 1),
    "llama/config.json": b"{}\n",
    "llama/empty": b"",
    "resnet50/params": random.Random(4).randbytes(CHUNK + 1),
    **{f"many/{number:04}": str(number).encode() for number in range(300)},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    for name, content in FILES.items():
        path = store / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    put = in_directory(store)
    for version in ("v1", "v2"):
        publish(put, "bert", version, {"params": version.encode() * CHUNK})
    move(put, "bert", "prod", "v1")
    return store


@pytest.fixture
def mount(store: Path, tmp_path: Path) -> Iterator[MountedStore]:
    with mounted(store, tmp_path, "--metadata-ttl", "0.1") as mount:
        yield mount


def made(image: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    done = trimsfs("image", *arguments, "--output", image)
    assert done.returncode == 0, done.stderr
    return done


def devices_of(image: Path) -> list[Path]:
    return [Path(device["path"]) for device in json.loads(Path(f"{image}.json").read_text())["devices"]]


def check(image: Path, devices: Sequence[Path]) -> None:
    """See that fsck.erofs finds nothing, where it is installed."""
    if (checker := shutil.which("fsck.erofs")) is not None:
        command = [checker, *(f"--device={device}" for device in devices), str(image)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("count", ["32", "1", "0"])
def test_linux_finds_what_the_mount_has(mount: MountedStore, tmp_path: Path, count: str) -> None:
    image = tmp_path / "all.erofs"
    made(image, mount.path, "--devices", count)
    devices = devices_of(image)
    assert len(devices) == min(int(count), 5)
    check(image, devices)
    with mounted_image(image, devices, tmp_path / "guest") as guest:
        assert found(guest) == found(mount.path)
        with pytest.raises(OSError, match="Read-only file system"):
            (guest / "llama/config.json").write_bytes(b"")


def test_an_image_has_only_what_was_named_with_the_names_of_the_mount(mount: MountedStore, tmp_path: Path) -> None:
    image = tmp_path / "some.erofs"
    (tmp_path / "link").symlink_to(mount.path / "resnet50")
    made(image, tmp_path / "link", mount.path / "llama/config.json")
    with mounted_image(image, devices_of(image), tmp_path / "guest") as guest:
        assert sorted(os.listdir(guest)) == ["llama", "resnet50"]
        assert os.listdir(guest / "llama") == ["config.json"]
        assert (guest / "resnet50/params").read_bytes() == FILES["resnet50/params"]


def test_what_an_image_cannot_have_is_told_in_a_line(mount: MountedStore, tmp_path: Path) -> None:
    image = tmp_path / "none.erofs"
    wrong: list[tuple[list[str | Path], str, str]] = [
        ([mount.path / "none", "-o", image], "NoSuchEntryError", "No such file or directory"),
        ([tmp_path, "-o", image], "NotMountedError", "is not on a trimsfs mount"),
        ([mount.path / "resnet50"], "ConfigurationError", "trimsfs image PATH... --output FILE"),
        ([mount.path / "resnet50", "-o", tmp_path / "no/image"], "ConfigurationError", "cannot be written"),
        (["--check", tmp_path / "none"], "ConfigurationError", "no image with its record"),
        (["--check", image, mount.path], "ConfigurationError", "takes an image alone"),
    ]
    for arguments, kind, message in wrong:
        done = trimsfs("image", *arguments)
        assert (done.returncode, done.stdout) == (exit_code(kind), "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not image.exists()


def test_an_alias_is_the_version_that_it_leads_to_now(mount: MountedStore, store: Path, tmp_path: Path) -> None:
    image = tmp_path / "prod.erofs"
    made(image, mount.path / "bert/prod")
    move(in_directory(store), "bert", "prod", "v2")
    with mounted_image(image, devices_of(image), tmp_path / "guest") as guest:
        assert sorted(os.listdir(guest / "bert")) == ["prod", "v1"]
        assert (guest / "bert/prod/params").read_bytes() == b"v1" * CHUNK
    assert trimsfs("image", "--check", image).returncode == 0, "the version is still there"


def test_links_lead_to_what_the_image_has(tmp_path: Path) -> None:
    store, image = tmp_path / "store", tmp_path / "hub.erofs"
    (store / "org/model").mkdir(parents=True)
    (store / "org/model/params").write_bytes(FILES["resnet50/params"])
    with mounted(store, tmp_path / "host", "--layout", "hf-cache") as mount:
        repository = mount.path / "models--org--model"
        done = trimsfs("image", repository / "blobs", "--output", image)
        assert done.returncode == exit_code("ConfigurationError")
        assert "/params, which the image would not have: name that, too\n" in done.stderr
        made(image, repository)
        with mounted_image(image, devices_of(image), tmp_path / "guest") as guest:
            assert found(guest / repository.name) == found(repository)
            (blob,) = (guest / repository.name / "blobs").iterdir()
            assert blob.read_bytes() == FILES["resnet50/params"]


def test_a_guest_reads_the_pages_of_the_host(mount: MountedStore, tmp_path: Path) -> None:
    """The image has the end of the file alone."""
    image = tmp_path / "llama.erofs"
    made(image, mount.path / "llama")
    assert image.stat().st_size % CHUNK == 0
    assert image.stat().st_blocks * 512 < 2 * CHUNK + (1 << 17), "the small file, the end of the large one, and names"
    assert mount.info("llama/model-1.safetensors")["pinned"]


def test_a_file_that_is_replaced_is_told(mount: MountedStore, store: Path, tmp_path: Path) -> None:
    image = tmp_path / "resnet50.erofs"
    made(image, mount.path / "resnet50")
    assert trimsfs("image", "--check", image).returncode == 0
    path = store / "resnet50/params"
    try:
        path.write_bytes(b"another one")
        assert trimsfs("refresh", mount.path).returncode == 0
        done = trimsfs("image", "--check", image)
        assert done.returncode == exit_code("ObjectChangedError")
        assert done.stderr == (
            f"trimsfs: {mount.path}/resnet50/params: replaced in the store meanwhile: make the image again\n"
        )
    finally:
        path.write_bytes(FILES["resnet50/params"])


@pytest.mark.parametrize("count", [pytest.param(1000, marks=pytest.mark.slow), 25])
@pytest.mark.timeout(1800)
def test_linux_finds_what_random_trees_have(tmp_path: Path, count: int) -> None:
    for seed in range(count):
        directory = tmp_path / str(seed)
        directory.mkdir()
        tree = RandomTree(random.Random(seed), directory)
        tree.write(directory / "image")
        check(directory / "image", tree.devices)
        with mounted_image(directory / "image", tree.devices, directory / "guest") as guest:
            assert found(guest) == tree.expected, f"seed {seed}"
        shutil.rmtree(directory)
