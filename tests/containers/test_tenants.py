"""A container that is given one tenant's models has no way to another's.

Control files are read with grep: busybox's cat copies by sendfile, which finds nothing in a file without a size.
"""

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.engines import Podman, PodmanContainer, Users, mountctl
from tests.containers.host import Host
from tests.support.mounts import MountedStore

SECRET = "secret"
AT_FDCWD = -100


@pytest.fixture(scope="module")
def tenant(podman: Podman, models: MountedStore, users: Users) -> Iterator[PodmanContainer]:
    """A container with the models of tenant-a, at their path and attached elsewhere."""
    subtree = f"{models.path}/tenant-a"
    with podman.started(*users.podman, f"--volume={subtree}:{subtree}:ro") as container:
        done = mountctl("attach", str(container.pid), subtree, "--at", "/attached")
        assert done.returncode == 0, done.stderr
        yield container


def test_no_path_leads_to_another_tenant(tenant: PodmanContainer, models: MountedStore, host: Host) -> None:
    own = f"{models.path}/tenant-a"
    assert tenant.read("cat", "/attached/gpt/params") == tenant.read("cat", f"{own}/gpt/params") != ""
    for path in (
        f"{own}/../tenant-b",
        f"{own}/../tenant-b/secret/params",
        f"{models.path}/tenant-b",
        "/attached/../tenant-b",
        "/attached/gpt/../../tenant-b/secret/params",
        "/proc/1/root/attached/../tenant-b",
        f"/proc/self/root{models.path}/tenant-b",
        f"/proc/1/cwd/{models.path}/tenant-b",
        f"{own}/.trims/../../tenant-b",
        f"{own}/.trims/../.trims/tenant-b/info",
        f"{own}/.trims/tenant-b/info",
    ):
        done = tenant.execute("ls", path)
        assert (done.returncode, done.stdout) == (1, ""), path
        assert "No such file" in done.stderr
    # `cd` and then `..`, as the kernel walks it, and not as a shell does.
    listed = tenant.read("sh", "-c", f"cd -P {own}/gpt && cat ../gpt/params >/dev/null && ls -a ../..")
    assert "tenant-b" not in listed
    assert "tenant-a" in listed
    found = tenant.read("sh", "-c", "find / -name secret -o -name tenant-b 2>/dev/null; true")
    assert found == ""
    open_files = tenant.read("sh", "-c", "ls -l /proc/*/fd /proc/*/cwd /proc/*/root 2>/dev/null; true")
    assert "tenant-b" not in open_files
    assert str(host.store) not in open_files


def test_control_files_tell_nothing_of_another_tenant(tenant: PodmanContainer, models: MountedStore) -> None:
    (models.path / "tenant-b/secret/params").read_bytes()
    assert SECRET in (models.path / ".trims/models").read_text(), "as the root tells of all"
    for directory in (f"{models.path}/tenant-a", "/attached"):
        about = tenant.read("grep", "", f"{directory}/.trims/.trims/info", f"{directory}/gpt/.trims/params/info")
        assert "params" in about
        shown = [about, tenant.read("grep", "", f"{directory}/gpt/.trims/params/tensors")]
        for name in ("models", "metrics", "control"):
            done = tenant.execute("grep", "", f"{directory}/.trims/{name}")
            assert done.returncode != 0, name
            shown.append(done.stdout)
        shown.append(tenant.read("probe", "attributes", directory))
        shown.append(tenant.read("probe", "attributes", f"{directory}/gpt/params"))
        assert "user.trims.etag" in shown[-1]
        assert not [text for text in shown if SECRET in text or "tenant-b" in text]


def test_a_file_handle_of_another_tenant_opens_nothing(tenant: PodmanContainer, models: MountedStore) -> None:
    """What a handle leads to is not bounded by the directory that is mounted, but by privilege."""
    kind, handle = handle_of(models.path / "tenant-b/secret/params")
    done = tenant.execute("probe", "handle", f"{kind}:{handle.hex()}", "/attached", user="0:0")
    assert (done.returncode, done.stdout) == (1, "open_by_handle_at: Operation not permitted\n")


def handle_of(path: Path) -> tuple[int, bytes]:
    """A file's handle and its kind."""

    class Handle(ctypes.Structure):
        _fields_ = (("size", ctypes.c_uint), ("kind", ctypes.c_int), ("bytes", ctypes.c_ubyte * 128))

    handle, mount = Handle(size=128), ctypes.c_int()
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.name_to_handle_at(AT_FDCWD, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount), 0)
    assert result == 0, os.strerror(ctypes.get_errno())
    return handle.kind, bytes(handle.bytes[: handle.size])


def test_the_host_can_open_by_that_handle(models: MountedStore, host: Host) -> None:
    """So that a refusal of it says something."""
    kind, handle = handle_of(models.path / "tenant-b/secret/params")
    libc = ctypes.CDLL(None, use_errno=True)
    content = len(handle).to_bytes(4, "little") + kind.to_bytes(4, "little") + handle
    directory = os.open(models.path / "tenant-a", os.O_RDONLY)
    try:
        file = libc.open_by_handle_at(directory, content, os.O_RDONLY)
        assert file >= 0, os.strerror(ctypes.get_errno())
        with os.fdopen(file, "rb") as opened:
            assert opened.read() == host.content("tenant-b/secret/params")
    finally:
        os.close(directory)


def test_a_tenant_may_not_command_when_others_own_the_mount(tenant: PodmanContainer, users: Users) -> None:
    """Root of the first user namespace is the owner here; other users, and root of other namespaces, are not."""
    done = tenant.execute("grep", "", "/attached/gpt/.trims/params/pin", user=f"{users.user}:{users.user}")
    if users.user == 0 and not users.namespace:
        assert json.loads(done.stdout.splitlines()[-1])["state"] == "done"
        assert tenant.execute("grep", "", "/attached/gpt/.trims/params/unpin").returncode == 0
        return
    assert done.returncode != 0
    assert "Operation not permitted" in done.stderr
