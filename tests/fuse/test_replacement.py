"""A model of several files that is replaced in the store, on a real mount that believes names for a long time."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import trimsfs
from tests.support.model_files import BIAS, WEIGHT, Array, onnx, safetensors
from tests.support.mounts import mounted

SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def publish(directory: Path, array: Array) -> list[bytes]:
    """Put a version of the model into the store; the content of its files."""
    directory.mkdir(exist_ok=True)
    contents = [safetensors({f"part{number}": array}) for number in range(len(SHARDS))]
    for shard, content in zip(SHARDS, contents, strict=True):
        (directory / "new").write_bytes(content)
        (directory / "new").replace(directory / shard)
    return contents


def opened_around(path: Path, event: Callable[[], object]) -> int | None:
    """Open a part of a model before an event and a part after it; the error number. Nothing stays open."""
    model = trimsfs.open(path)
    assert list(model.numpy("part0")) == ["part0"]
    event()
    try:
        assert list(model.numpy("part2")) == ["part2"]
    except OSError as error:
        return error.errno
    return None


def test_one_file_that_was_replaced_has_its_siblings_looked_up_anew(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    old = publish(store / "model", WEIGHT)
    with mounted(store, tmp_path, "--metadata-ttl", "600", "--prefetch", "off") as mount:
        files = [mount.path / "model" / shard for shard in SHARDS]
        with files[0].open("rb") as before:
            assert files[1].read_bytes() == old[1]
            assert os.getxattr(before.fileno(), "user.trims.replaced") == b"false"
            information = mount.path / "model/.trims" / SHARDS[0] / "info"
            generation = json.loads(information.read_bytes())["generation"]
            new = publish(store / "model", BIAS)
            assert files[1].read_bytes() == old[1]
            assert files[2].read_bytes() == new[2]  # which was not here, and cannot be had of the old version
            assert json.loads(information.read_bytes())["generation"] != generation
            assert [file.read_bytes() for file in files] == new
            assert before.read() == old[0]
            assert os.getxattr(before.fileno(), "user.trims.replaced") == b"true"
            assert os.getxattr(files[0], "user.trims.replaced") == b"false"
        assert "/model/: files were replaced in the store while programs have 1 of them open" in mount.log()
        assert "trimsfs_files_replaced_while_open_total 1.0" in (mount.path / ".trims/metrics").read_text()


def test_a_model_that_is_replaced_while_it_is_opened_is_not_mixed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    publish(store / "model", WEIGHT)
    weights = {f"part{number}": shard for number, shard in enumerate(SHARDS)}
    (store / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with mounted(store, tmp_path, "--metadata-ttl", "600", "--prefetch", "off") as mount:
        assert opened_around(mount.path / "model", lambda: publish(store / "model", BIAS)) == errno.ESTALE
        assert opened_around(mount.path / "model", lambda: None) is None


def external_data(path: Path, event: Callable[[], object]) -> bytes | int | None:
    """The bytes of a model's only tensor, which are first used after an event, or the error number."""
    model = trimsfs.open(path)
    (tensor,) = model.table.tensors
    event()
    try:
        return bytes(model.raw(tensor))
    except OSError as error:
        return error.errno


def test_external_data_of_another_version_than_the_graph_is_refused(tmp_path: Path) -> None:
    def publish(array: Array) -> None:
        graph = onnx({"w": array}, external={"location": "weights"})
        for name, content in (("weights", array.data), ("model.onnx", graph)):
            (store / "new").write_bytes(content)
            (store / "new").replace(store / "model" / name)

    store = tmp_path / "store"
    (store / "model").mkdir(parents=True)
    publish(WEIGHT)
    other = Array(WEIGHT.dtype, WEIGHT.shape, WEIGHT.data[::-1])
    with mounted(store, tmp_path, "--metadata-ttl", "600", "--prefetch", "off") as mount:
        path = mount.path / "model/model.onnx"
        (path.parent / "weights").stat()
        assert external_data(path, lambda: publish(other)) == errno.ESTALE
        assert external_data(path, lambda: None) == other.data
