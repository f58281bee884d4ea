"""`trimsfs import` from a Hugging Face hub, here a fake one, into a bucket and a directory."""

import contextlib
import hashlib
import os
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.backends import shared_bucket, use_only
from tests.services import HOST, S3Server
from tests.services.hub import TOKEN, Hub
from tests.versions.pusher import PART, ran
from trimsfs.formats.version_records import Manifest

LARGEST_FILE = 64 << 10
"""Bytes of the largest file that an import may write on its host: much less than a part."""
FILES = {
    "config.json": b"{}",  # not in LFS: the hub tells its git id alone
    "model.safetensors": random.Random(1).randbytes(4 * PART + 11),
    "sub/tokenizer.json": random.Random(2).randbytes(5000),
    "empty": b"",
}


@pytest.fixture
def repository(hub: Hub) -> Iterator[str]:
    """A repository with FILES, and a hidden one."""
    name = f"org-{uuid.uuid4().hex[:12]}/m"
    for path, content in {**FILES, ".gitattributes": b"*"}.items():
        hub.put(f"model/{name}", path, content)
    yield name
    hub.set("damaged", False)


def environment(hub: Hub, scratch: Path) -> dict[str, str]:
    """The hub's, and directories of its own for whatever a library may keep."""
    own = {name: str(scratch) for name in ("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME")}
    return {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": HOST, "HF_TOKEN": "", **own}


def test_an_import_from_a_hub_into_a_bucket_keeps_nothing_on_its_host(
    hub: Hub, repository: str, seaweed: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_only(seaweed, monkeypatch)
    scratch, log = tmp_path / "scratch", tmp_path / "log"
    scratch.mkdir()
    own = environment(hub, scratch) | seaweed.environment()
    with contextlib.closing(seaweed.client()) as client:
        bucket, name = shared_bucket(client), uuid.uuid4().hex
        arguments = ["import", f"hf://{repository}", f"s3://{bucket}/{name}/m:v1", "--addressing-style", "path"]
        assert ran(arguments, log, own, largest_file=LARGEST_FILE) == 0, log.read_text()
        assert [path for path in scratch.rglob("*") if path.is_file()] == []

        manifest = Manifest.parse(
            client.get_object(Bucket=bucket, Key=f"{name}/m/.trims-versions/v1.json")["Body"].read()
        )
        assert {path: file.sha256 for path, file in manifest.files.items()} == {
            path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()
        }
        for path, content in FILES.items():
            assert client.get_object(Bucket=bucket, Key=f"{name}/m/v1/{path}")["Body"].read() == content
    into_a_directory = ["import", f"hf://{repository}", f"{scratch}/m:v1"]
    assert ran(into_a_directory, log, own, largest_file=LARGEST_FILE) != 0, "the limit is none"


@pytest.mark.parametrize("path", ["model.safetensors", "sub/tokenizer.json"])
def test_an_import_compares_what_it_publishes_with_the_digests_of_the_hub(
    hub: Hub, repository: str, tmp_path: Path, path: str
) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    store.mkdir()
    for other in FILES.keys() - {path}:
        hub.delete(f"model/{repository}", other)
    arguments = ["import", f"hf://{repository}", f"{store}/m:v1"]
    hub.set("damaged", True)
    assert ran(arguments, log, environment(hub, tmp_path)) == 14
    assert f"{path}: it is not what its digest says" in log.read_text()
    assert not (store / "m/.trims-versions/v1.json").exists()
    assert not [file for file in (store / "m").rglob("*") if file.name == Path(path).name]

    hub.set("damaged", False)  # and then the same command succeeds
    assert ran(arguments, log, environment(hub, tmp_path)) == 0, log.read_text()
    assert (store / "m/v1" / path).read_bytes() == FILES[path]


@pytest.mark.parametrize(
    ("access", "token", "remedy"),
    [
        ("gated", "", "and set HF_TOKEN, or run `hf auth login`"),
        ("gated, not granted", TOKEN, "with the account of the token"),
    ],
)
def test_an_import_of_a_gated_repository_names_the_remedy(
    hub: Hub, repository: str, tmp_path: Path, access: str, token: str, remedy: str
) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    store.mkdir()
    hub.restrict(f"model/{repository}", access)
    own = environment(hub, tmp_path) | {"HF_TOKEN": token}
    assert ran(["import", f"hf://{repository}", f"{store}/m:v1"], log, own) == 6
    address = f"{hub.endpoint}/{repository}"
    assert log.read_text() == f"trimsfs: hf://{repository}: gated: accept its terms at {address} {remedy}\n"
    assert os.listdir(store) == [], "nothing is left of it"

    hub.restrict(f"model/{repository}", "gated")
    own["HF_TOKEN"] = TOKEN
    assert ran(["import", f"hf://{repository}", f"{store}/m:v1"], log, own) == 0, log.read_text()
