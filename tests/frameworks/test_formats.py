"""Files as their own libraries write them: our tables tell what is in them, our client gives it without a copy."""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.frameworks import NOT_FOR_NUMPY, program
from tests.support.mounts import MountedStore, mounted
from trimsfs.formats import BufferSource, parse

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

FILES = {
    "others": [
        *("arrays.npz", "array.npy", "dictionary.pt", "checkpoint.pt", "protocol5.pt", "model.safetensors"),
        *("model.gguf", "inside.onnx", "beside.onnx"),
    ],
    "mxnet": ["named.params", "listed.params", "gluon.params", "scalar.params"],
}
NOT_FOR_TORCH = {"model.gguf", "arrays.npz"}

Facts = dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Written:
    """Files, what is in each, and the same files on a mount."""

    directory: Path
    facts: dict[str, Facts]
    mount: MountedStore


@pytest.fixture(scope="module", params=FILES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    scratch = tmp_path_factory.mktemp("formats")
    directory = scratch / "store"
    writer = "mxnet_formats_write" if request.param == "mxnet" else "formats_write"
    facts = program(writer, request.param, directory)
    assert sorted(facts) == sorted(FILES[request.param])
    with mounted(directory, scratch) as mount:
        yield Written(directory, facts, mount)


def test_tables_tell_what_libraries_have_written(written: Written) -> None:
    for name, facts in written.facts.items():
        path = written.directory / name
        data = path.read_bytes()
        found: Facts = {}
        for tensor in parse(BufferSource(data), name).tensors:
            content = data if tensor.file is None else (path.parent / tensor.file).read_bytes()
            crc = zlib.crc32(content[tensor.offset : tensor.offset + tensor.nbytes])
            found[tensor.name] = [tensor.dtype, list(tensor.shape), crc]
        assert found == facts, name


def test_the_mount_tells_the_same_tables(written: Written) -> None:
    for name, facts in written.facts.items():
        table = json.loads((written.mount.path / ".trims" / name / "tensors").read_text())
        assert {tensor["name"]: [tensor["dtype"], tensor["shape"]] for tensor in table["tensors"]} == {
            tensor: fact[:2] for tensor, fact in facts.items()
        }


@pytest.mark.parametrize("place", ["local", "mount"])
def test_the_client_gives_arrays_that_nobody_copied(written: Written, place: str) -> None:
    framework = "mxnet" if "named.params" in written.facts else "others"
    root = written.directory if place == "local" else written.mount.path
    names = [name for name in written.facts if name not in NOT_FOR_NUMPY]
    for name, result in program("client_load", framework, *[root / name for name in names]).items():
        assert result == {"facts": written.facts[name], "private_kib": 0, "others_unchanged": True}, name


def test_the_client_gives_tensors_that_nobody_copied(written: Written) -> None:
    if "named.params" in written.facts:
        pytest.skip("PyTorch is not in MXNet's environment")
    names = [name for name in written.facts if name not in NOT_FOR_TORCH]
    paths = [written.mount.path / name for name in names]
    for name, result in program("client_load", "others", "--torch", *paths).items():
        assert result == {"facts": written.facts[name], "private_kib": 0, "others_unchanged": True}, name
