"""A sharded model: its files are found by an index or by their numbers, and each is opened when it is needed."""

import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trimsfs
from tests.support import model_files
from tests.support.model_files import ARRAYS, BIAS, HALF, WEIGHT, Array, content
from trimsfs.client import Model, pages

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FORMATS: Mapping[str, Callable[[Mapping[str, Array]], bytes]] = {
    "safetensors": model_files.safetensors,
    "gguf": model_files.gguf,
    "bin": model_files.torch,
}


def write(
    directory: Path, suffix: str = "safetensors", *, index: str | None = INDEX, name: str = "model", **changed: str
) -> Path:
    """A model in two shards, beside what is in no model; in the index, tensors may have *changed* their shards."""
    first, second = (f"{name}-{number:05}-of-00002.{suffix}" for number in (1, 2))
    shards = {first: {"net.weight": WEIGHT, "half": HALF}, second: {"net.bias": BIAS}}
    for shard, arrays in shards.items():
        (directory / shard).write_bytes(FORMATS[suffix](arrays))
    if index is not None:
        weight_map = {each: shard for shard, arrays in shards.items() for each in arrays}
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changed}))
    (directory / "config.json").write_text("{}")
    return directory


def mapped(directory: Path) -> set[str]:
    """The files of a directory that this process has mapped."""
    return set(re.findall(rf"{re.escape(str(directory))}/(\S+)", Path("/proc/self/maps").read_text()))


@pytest.mark.parametrize("where", ["", INDEX])
def test_a_model_with_an_index_is_one_model(tmp_path: Path, where: str) -> None:
    if where:
        assert "No such file" in error(tmp_path / where, FileNotFoundError)
    model = trimsfs.open(write(tmp_path) / where)
    assert content(model) == ARRAYS
    assert [(tensor.name, tensor.file) for tensor in model.table.tensors] == [
        *[("net.weight", FIRST), ("half", FIRST)],
        ("net.bias", SECOND),
    ]
    assert model.table.format == "safetensors"


def test_an_index_may_be_of_a_variant(tmp_path: Path) -> None:
    assert (
        content(trimsfs.open(write(tmp_path, name="model.fp16", index="model.safetensors.index.fp16.json"))) == ARRAYS
    )


def test_an_index_may_name_files_in_directories_below(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    write(tmp_path / "weights", index=None)
    weight_map = {"net.weight": f"weights/{FIRST}", "half": f"weights/{FIRST}", "net.bias": f"weights/{SECOND}"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert content(trimsfs.open(tmp_path)) == ARRAYS


@pytest.mark.parametrize("suffix", FORMATS)
def test_numbered_shards_without_an_index_are_one_model(tmp_path: Path, suffix: str) -> None:
    assert content(trimsfs.open(write(tmp_path, suffix, index=None))) == ARRAYS


def test_only_the_shards_that_are_asked_for_are_opened(tmp_path: Path) -> None:
    model = trimsfs.open(write(tmp_path))
    assert mapped(tmp_path) == set()
    [tensor] = model.select("net.b*")
    assert bytes(model.raw(tensor)) == BIAS.data
    assert mapped(tmp_path) == {SECOND}
    (tmp_path / INDEX).unlink()  # it is read once
    assert content(model) == ARRAYS
    assert mapped(tmp_path) == {FIRST, SECOND}


@pytest.mark.parametrize("sharded", [True, False])
def test_the_bytes_of_a_tensor_are_had_by_its_name(tmp_path: Path, sharded: bool) -> None:
    (tmp_path / "model.safetensors").write_bytes(model_files.safetensors({"half": HALF, "a[0]": BIAS}))
    (tmp_path / "sharded").mkdir()
    model = trimsfs.open(write(tmp_path / "sharded") if sharded else tmp_path)
    assert bytes(model.raw("half")) == HALF.data
    if not sharded:
        assert bytes(model.raw("a[0]")) == BIAS.data
    with pytest.raises(LookupError, match="no tensor name matches 'head'"):
        model.raw("head")
    with pytest.raises(TypeError, match=r"7 is no tensor: give a name, or an entry of model.table.tensors"):
        model.raw(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("sharded", [True, False])
def test_patterns_choose_tensors(tmp_path: Path, sharded: bool) -> None:
    (tmp_path / "model.safetensors").write_bytes(model_files.safetensors())
    (tmp_path / "sharded").mkdir()
    model = trimsfs.open(write(tmp_path / "sharded") if sharded else tmp_path)
    assert list(model.numpy()) == [tensor.name for tensor in model.table.tensors]
    assert model.numpy("half")["half"].tobytes() == HALF.data
    assert set(model.numpy(["net.*", "*bias"])) == {"net.weight", "net.bias"}
    with pytest.raises(LookupError, match="no tensor name matches 'none'"):
        model.numpy(["half", "none"])
    with pytest.raises(ValueError, match="at least one pattern"):
        model.numpy([])


def test_folding_is_that_of_the_shards_that_are_open(tmp_path: Path) -> None:
    try:
        pages.own(0, 0)
    except OSError:
        pytest.skip("needs Linux 6.7")
    model = trimsfs.open(write(tmp_path))
    assert model.fold().own == 0
    for array in model.numpy().values():
        array.reshape(-1)[:1] = 1
    assert model.fold().own == 2 * pages.PAGE


def test_a_directory_of_one_file_is_that_file(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.tmp", "tokenizer.json", ".model.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "resnet-0000.params").write_bytes(model_files.mxnet())
    model = trimsfs.open(tmp_path)
    assert isinstance(model, Model)
    assert content(model) == ARRAYS


def test_a_file_is_opened_at_once_so_that_its_error_is_that_of_the_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(model_files.safetensors())
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda *_, **__: pytest.fail("another look at the path"))
        model = trimsfs.open(tmp_path / "model.safetensors")
    assert content(model) == ARRAYS


def test_safetensors_are_preferred_to_other_formats(tmp_path: Path) -> None:
    write(tmp_path, "bin", index="pytorch_model.bin.index.json", name="pytorch_model")
    (tmp_path / "training_args.bin").write_bytes(b"no model")
    (tmp_path / "model.safetensors").write_bytes(model_files.safetensors({"weight": WEIGHT}))
    assert content(trimsfs.open(tmp_path)) == {"weight": WEIGHT}
    assert content(trimsfs.open(tmp_path / "pytorch_model.bin.index.json")) == ARRAYS


def error(path: Path, kind: type[Exception] = trimsfs.FormatError, *, use: bool = False) -> str:
    """What opening a path says, or the first *use* of all tensors."""
    with pytest.raises(kind) as caught:
        trimsfs.open(path).numpy() if use else trimsfs.open(path)
    assert caught.type is kind
    return str(caught.value).replace(str(path), "PATH")


def test_a_directory_without_a_model_says_what_to_open(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    said = error(tmp_path, FileNotFoundError)
    assert said == ("[Errno 2] no model in this directory: open a model's file, or its directory: 'PATH'")
    for name in ("v1", "v2", ".trims"):
        (tmp_path / name).mkdir()
    (tmp_path / "prod").symlink_to("v2")
    assert "or its directory, one of prod, v1, v2: " in error(tmp_path, FileNotFoundError)


@pytest.mark.parametrize(
    ("others", "named"),
    [
        (["consolidated.safetensors"], f"2 models: {INDEX}, consolidated.safetensors"),
        (["old-00001-of-00003.safetensors"], f"2 models: {INDEX}, old-*-of-00003.safetensors"),
        ([f"{letter}.safetensors" for letter in "abcdef"], f"7 models: {INDEX}, a.safetensors, b.safetensors, c.s"),
    ],
)
def test_several_models_in_a_directory_are_an_error_that_names_them(
    tmp_path: Path, others: list[str], named: str
) -> None:
    write(tmp_path)
    for other in others:
        (tmp_path / other).write_bytes(model_files.safetensors())
    said = error(tmp_path)
    assert said.startswith(f"PATH: {named}")
    assert said.endswith(": open one by the path of its file or index, or move each to a directory of its own")
    assert content(trimsfs.open(tmp_path / INDEX)) == ARRAYS


@pytest.mark.parametrize("index", [INDEX, None])
@pytest.mark.parametrize("shard", [FIRST, SECOND])
def test_a_missing_shard_is_an_error_of_the_open(tmp_path: Path, index: str | None, shard: str) -> None:
    write(tmp_path, index=index)
    (tmp_path / shard).unlink()
    other = SECOND if shard == FIRST else FIRST
    why = f"{INDEX} lists it" if index else f"{other} is one of 2"
    assert error(tmp_path, FileNotFoundError) == f"[Errno 2] a shard is missing ({why}): add it: 'PATH/{shard}'"


@pytest.mark.parametrize("changed", [{"half": SECOND}, {"other": SECOND}])
def test_a_tensor_that_is_not_in_its_shard_is_an_error(tmp_path: Path, changed: dict[str, str]) -> None:
    write(tmp_path, **changed)
    (name,) = changed
    said = error(tmp_path, use=True)
    why = f"{INDEX} lists it there: index and shards belong to different models"
    assert said == f"PATH/{SECOND}: no tensor '{name}', but {why}"
    assert set(trimsfs.open(tmp_path).numpy("net.weight")) == {"net.weight"}


def test_a_tensor_in_two_numbered_shards_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, index=None)
    (tmp_path / SECOND).write_bytes(model_files.safetensors({"half": HALF}))
    said = error(tmp_path, use=True)
    assert said == f"PATH: tensor 'half' is in {FIRST} and in {SECOND}: open the shards one by one"


def test_the_index_decides_which_tensors_there_are(tmp_path: Path) -> None:
    write(tmp_path)
    more = {"net.bias": BIAS, "half": WEIGHT, "unlisted": WEIGHT}
    (tmp_path / SECOND).write_bytes(model_files.safetensors(more))
    assert content(trimsfs.open(tmp_path)) == ARRAYS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a valid index of shards: "),
        ("[" * 100_000, "not a valid index of shards: "),
        ("[]", "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is a duplicate name"),
        ('{"weight_map": {"a": 1}}', "tensor 'a' is in 1, which is not a path below the index"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "which is not a path below the index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is not a path below the index"),
        ('{"weight_map": {"a": ""}}', "which is not a path below the index"),
        ('{"weight_map": {"a": "x\\u0000"}}', "which is not a path below the index"),
    ],
)
def test_an_index_that_is_none_is_an_error(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / INDEX).write_text(text)
    for path in (tmp_path, tmp_path / INDEX):
        assert says in error(path)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("trimsfs.client.shards.HEADER_LIMIT", f"PATH/{INDEX}: the index exceeds"),
        ("trimsfs.formats.table.MOST_SIGNS", "its description in JSON has too many values"),
    ],
)
def test_an_index_beyond_a_limit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, says: str
) -> None:
    monkeypatch.setattr(limit, 10)
    assert says in error(write(tmp_path))


def test_shards_of_no_model_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / FIRST).write_bytes(b"no model")
    assert error(tmp_path, use=True).startswith(f"PATH/{FIRST}: unknown format")
    assert list(trimsfs.open(tmp_path).numpy("net.bias")) == ["net.bias"]


@pytest.mark.parametrize(
    ("leased", "replaced", "told"),
    [
        ({}, None, None),
        ({FIRST: "new"}, None, FIRST),
        ({SECOND: "new"}, None, SECOND),
        ({}, FIRST, FIRST),
        ({FIRST: "new", SECOND: "new"}, FIRST, FIRST),
    ],
)
def test_copies_of_two_versions_are_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leased: dict[str, str], replaced: str | None, told: str | None
) -> None:
    """A lease is of what a path leads to, which need not be the file that is open."""
    monkeypatch.setattr("trimsfs.client.sharded_model.PATIENCE_S", 0)
    loaded: list[str] = []

    def to(shard: Model, *_: object) -> Any:
        loaded.append(shard.path.name)
        return SimpleNamespace(generation=leased.get(shard.path.name, "old"), tensors=ARRAYS)

    monkeypatch.setattr(Model, "to", to)
    monkeypatch.setattr(Model, "generation", "old", raising=False)
    monkeypatch.setattr(Model, "replaced", property(lambda each: each.path.name == replaced and len(loaded) == 2))
    monkeypatch.setattr("trimsfs.extras.gpu.client.DeviceModel.joined", lambda _, parts: parts)
    model = trimsfs.open(write(tmp_path))
    if told is None:
        assert len(model.to("cuda")) == 2  # type: ignore[arg-type]
    else:
        with pytest.raises(OSError, match="replaced in the store since it was opened: open the model again") as caught:
            model.to("cuda")
        assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, str(tmp_path / told))
