"""transformers loads a model by its name on the hub, offline, from a mount that is laid out as its cache.

The hub is a fake, as no real one can be reached.
"""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks import PROGRAMS
from tests.services.hub import Hub
from tests.support.frameworks import TIMEOUT_S, python_of, report_of
from tests.support.mounts import MountedStore, mounted
from trimsfs.tiers.host.page_cache import resident_bytes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PAGE = 4096
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Published:
    """What somebody publishes, and what a program computes from the local files."""

    directory: Path
    outputs: dict[str, Any]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    directory = tmp_path_factory.mktemp("hf") / "published"
    outputs = report_of([python_of("others"), PROGRAMS / "hub_build.py", directory], SETTINGS)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return Published(directory, outputs)


def load(names: Sequence[str], cache: Path) -> list[dict[str, Any]]:
    """Load models in as many processes, all at once, with a directory as huggingface_hub's cache."""
    environment = {**os.environ, **SETTINGS, "HF_HUB_CACHE": str(cache)}
    processes = [
        subprocess.Popen(
            [python_of("others"), PROGRAMS / "hub_load.py", name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate(timeout=TIMEOUT_S)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        reports = []
        for process in processes:
            out, err = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, err
            reports.append(json.loads(out))
        return reports
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def mount(hub: Hub, published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount with the model ``org/m`` and another one."""
    directory = tmp_path_factory.mktemp("hub")
    for path in published.directory.iterdir():
        hub.put("model/org/m", path.name, path.read_bytes())
    hub.put("model/other/n", "config.json", b"{}")
    hub.requests()
    options = ("--layout", "hf-cache", "--endpoint-url", hub.endpoint)
    with mounted("hf://org/m,other/n", directory, *options, environment={"NO_PROXY": "127.0.0.1"}) as found:
        yield found


def test_a_model_is_loaded_by_name_in_two_processes_cold_with_one_fetch_and_one_copy(
    published: Published, mount: MountedStore, hub: Hub
) -> None:
    reports = load(["org/m", "org/m"], mount.path)

    for report in reports:
        assert {name: report[name] for name in ("tokens", "logits")} == published.outputs
        assert report["repositories"] == ["org/m", "other/n"]
    assert reports[0]["files"] == reports[1]["files"]  # the same inodes
    sizes = {path.name: path.stat().st_size for path in published.directory.iterdir()}
    shards = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    assert [Path(path).name for path, _, _ in reports[0]["files"]] == sorted(shards)
    # Each byte came once from the store; refs and the other model are a few more.
    fetched = mount.metrics()["trimsfs_fetch_fetched_bytes_total"]
    assert sum(shards.values()) <= fetched < sum(sizes.values()) + 1000
    asked = Counter(line for line in hub.requests() if line.startswith("CDN"))
    assert set(asked.values()) == {1}
    # The pages are those of the one local copy: the kernel has none of them under the names in the mount.
    names = [Path(path) for path, _, _ in reports[0]["files"]]
    blobs = [blob for blob in (mount.cache / "blobs").rglob("*") if blob.stat().st_size >= min(shards.values())]
    whole = sorted(-(-size // PAGE) * PAGE for size in shards.values())
    assert [_cached(name) for name in names] == [0] * len(shards)
    if sorted(map(_cached, blobs)) != whole:  # the kernel may have had no room for some
        for name in names:
            name.read_bytes()
    assert sorted(map(_cached, blobs)) == whole
    assert [_cached(name) for name in names] == [0] * len(shards)


def _cached(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = resident_bytes(descriptor)
    finally:
        os.close(descriptor)
    assert found is not None
    return found


def test_links_and_files_of_the_cache_are_what_the_kernel_shows(published: Published, mount: MountedStore) -> None:
    model = mount.path / "models--org--m"
    assert sorted(os.listdir(mount.path)) == ["models--org--m", "models--other--n"]
    commit = (model / "refs/main").read_text()
    assert os.listdir(model / "snapshots") == [commit]
    contents = {path.name: path.read_bytes() for path in published.directory.iterdir()}
    assert {path.name: path.read_bytes() for path in (model / "snapshots" / commit).iterdir()} == contents
    links = list((model / "blobs").iterdir())
    assert len(links) == len(contents)
    for link in links:
        assert link.is_symlink()
        assert os.lstat(link).st_size == len(os.readlink(link))
        assert link.read_bytes() == contents[link.resolve().name]
        assert link.resolve().parent == model / "snapshots" / commit
