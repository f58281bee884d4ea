"""A Hugging Face hub, and the layout of its cache, on a mount: links, branches that move, a server that is killed."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.hub import TOKEN, Hub
from tests.support.hf_cache import REPOSITORY, commit_of, download, snapshot
from tests.support.keepers import kill
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until

WEIGHTS = os.urandom(9 << 20)
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(3 << 20), "onnx/model.onnx": b"onnx" * 999}
"""Those of a local cache."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the hub, and its directory in the layout."""

    hub: Hub
    name: str
    path: Path
    mount: MountedStore

    def snapshot(self) -> Path:
        return self.path / "snapshots" / (self.path / "refs/main").read_text()


def environment(**more: str) -> dict[str, str]:
    return {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Iterator[Model]:
    name = f"org-{uuid.uuid4().hex[:12]}/m"
    hub.put(f"model/{name}", "config.json", b"{}")
    hub.put(f"model/{name}", "model.safetensors", WEIGHTS)
    options = ("--layout", "hf-cache", "--endpoint-url", hub.endpoint, "--cold-open", "wait")
    with mounted(f"hf://{name}", tmp_path, *options, environment=environment()) as mount:
        yield Model(hub, name, mount.path / f"models--{name.replace('/', '--')}", mount)


def test_links_lead_to_files_also_after_the_server_was_killed(model: Model) -> None:
    links = {link.name: link for link in (model.path / "blobs").iterdir()}
    assert len(links) == 2
    before = {name: (os.readlink(link), os.lstat(link).st_ino) for name, link in links.items()}
    held = os.open(model.path / "blobs", os.O_RDONLY)
    try:
        kill(model.mount)
        assert {name: os.readlink(name, dir_fd=held) for name in links} == {
            name: to for name, (to, _) in before.items()
        }
    finally:
        os.close(held)
    for name, link in links.items():
        assert (os.readlink(link), os.lstat(link).st_ino) == before[name]
        assert link.read_bytes() == {"config.json": b"{}", "model.safetensors": WEIGHTS}[link.resolve().name]
        with pytest.raises(OSError, match="Read-only"):
            link.unlink()
    with pytest.raises(OSError, match="Invalid argument"):
        os.readlink(model.snapshot() / "config.json")


def test_a_branch_that_moves_is_followed_and_the_old_commit_goes_on(model: Model) -> None:
    old = model.snapshot()
    with (old / "config.json").open("rb") as config:
        model.hub.put(f"model/{model.name}", "config.json", b"{new}")
        assert trimsfs("refresh", model.path).returncode == 0
        new = model.snapshot()
        assert new != old
        assert (new / "config.json").read_bytes() == b"{new}"
        assert config.read() == b"{}"
    # A program that has read refs/main before goes on with its commit, of which nothing was here yet.
    assert (old / "model.safetensors").read_bytes() == WEIGHTS
    assert (new / "model.safetensors").read_bytes() == WEIGHTS
    fetched = model.mount.metrics()["trimsfs_fetch_fetched_bytes_total"]
    assert len(WEIGHTS) <= fetched < len(WEIGHTS) + 1000  # one content, whatever its commits


def test_commands_take_a_link_for_what_it_leads_to(model: Model) -> None:
    warmed = trimsfs("warm", model.path / "blobs")
    assert "warmed 2 files" in warmed.stdout, warmed
    weights = model.snapshot() / "model.safetensors"
    wait_until(lambda: os.getxattr(weights, "user.trims.verified") == b"true", timeout_s=30)  # once it is idle
    assert os.getxattr(weights, "user.trims.digest") == f"sha256:{hashlib.sha256(WEIGHTS).hexdigest()}".encode()
    link = next(link for link in (model.path / "blobs").iterdir() if link.resolve() == weights)
    assert trimsfs("evict", link).returncode == 0
    assert os.getxattr(weights, "user.trims.verified") == b"false"
    listed = trimsfs("ls", model.path)
    assert listed.returncode == 0, listed.stderr
    assert "blobs" not in listed.stdout


def test_a_gated_model_is_mounted_with_a_token_that_root_alone_may_read(hub: Hub, tmp_path: Path) -> None:
    name = f"org-{uuid.uuid4().hex[:12]}/gated"
    hub.put(f"model/{name}", "model.safetensors", WEIGHTS)
    hub.restrict(f"model/{name}", "gated")
    options = ("--endpoint-url", hub.endpoint)
    mountpoint, cache = tmp_path / "refused", tmp_path / "refused-cache"
    mountpoint.mkdir()
    nobody = environment(HF_HOME=str(tmp_path / "none"))
    refused = trimsfs(
        "mount", f"hf://{name}", mountpoint, "--cache-dir", cache, "--log-file", tmp_path / "log", *options,
        environment=nobody,
    )  # fmt: skip
    assert refused.returncode == 6
    terms = f"gated: accept its terms at {hub.endpoint}/{name} and set HF_TOKEN, or run `hf auth login`"
    assert f"hf://{name}: {terms}" in refused.stderr
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "token").write_text(TOKEN)
    (home / "token").chmod(0o600)
    with mounted(f"hf://{name}", tmp_path / "own", *options, environment=environment(HF_HOME=str(home))) as mount:
        assert (mount.path / "model.safetensors").read_bytes() == WEIGHTS
        assert TOKEN not in mount.log()


def test_programs_find_a_model_offline_in_a_mounted_cache(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    download(cache, FILES)
    with mounted(cache, tmp_path / "mount") as mount:
        found = snapshot(mount.path, {"HF_HUB_OFFLINE": "1"})
        assert found == mount.path / REPOSITORY / "snapshots" / commit_of(FILES)
        assert {name: (found / name).read_bytes() for name in FILES} == FILES
        fetched = mount.metrics()["trimsfs_fetch_fetched_bytes_total"]
        for blob in (mount.path / REPOSITORY / "blobs").iterdir():
            assert blob.read_bytes() in FILES.values()
        assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == fetched, "a blob is fetched again by its name"
