"""A model that is open: its content is looked at when it is asked for, and is that of the file that was opened."""

import errno
import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import trimsfs
from tests.support import model_files
from tests.support.model_files import ARRAYS, WEIGHT, content, field
from trimsfs.client import Model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_files.safetensors())
    return path


def open_files() -> list[str]:
    """Where this process's descriptors lead."""
    return [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


def test_nothing_is_mapped_before_it_is_asked_for(path: Path) -> None:
    model = trimsfs.open(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert content(model) == ARRAYS
    assert str(path) in Path("/proc/self/maps").read_text()


def test_what_is_mapped_is_what_was_opened(path: Path) -> None:
    model = trimsfs.open(path)
    (path.parent / "next").write_bytes(model_files.safetensors({"weight": WEIGHT}))
    (path.parent / "next").rename(path)
    assert content(model) == ARRAYS
    assert content(trimsfs.open(path)) == {"weight": WEIGHT}


def test_a_file_that_is_not_there_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trimsfs.open(tmp_path / "missing")


def test_an_empty_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    model = Model(tmp_path / "empty")
    assert model.mapping == b""
    with pytest.raises(trimsfs.FormatError):
        model.numpy()


def test_threads_get_one_mapping_and_one_table(path: Path) -> None:
    for _ in range(50):
        model = Model(path)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda opened: (id(opened.mapping), id(opened.table)), [model] * 8))
        assert len(set(found)) == 1


def test_the_file_is_closed_with_the_model_and_its_tensors(path: Path) -> None:
    trimsfs.open(path)
    gc.collect()
    assert str(path) not in open_files()
    tensors = trimsfs.open(path).numpy()
    gc.collect()
    assert tensors["net.weight"].tobytes() == WEIGHT.data
    assert str(path) in open_files()  # the mapping's
    del tensors
    gc.collect()
    assert str(path) not in open_files()


def test_a_program_that_ends_with_a_model_open_ends_silently(path: Path) -> None:
    code = f"import trimsfs; model = trimsfs.open({str(path)!r}); table = trimsfs.open({str(path)!r}).table"
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_opening_a_model_imports_nothing_that_only_others_need(path: Path) -> None:
    needed = "[*sys.modules.keys() & {'cuda', 'numpy', 'trimsfs.extras.gpu.client', 'trimsfs.extras.gpu.cuda'}]"
    code = f"import sys, trimsfs; trimsfs.open({str(path)!r}); print({needed})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def onnx_of(*files: str) -> bytes:
    """A model of one byte in each of several files."""
    tensors = [
        field(1, 1)
        + field(2, 2)
        + field(8, file.encode())
        + field(13, field(1, b"location") + field(2, file.encode()))
        + field(14, 1)
        for file in files
    ]
    return field(7, b"".join(field(5, tensor) for tensor in tensors))


@pytest.mark.parametrize("replaced", [None, "model.onnx", "first.bin"])
def test_external_data_is_of_the_version_of_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: str | None
) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_of("first.bin", "second.bin"))
    (tmp_path / "first.bin").write_bytes(b"1")
    (tmp_path / "second.bin").write_bytes(b"2")
    model = trimsfs.open(tmp_path / "model.onnx")
    first, second = model.table.tensors
    assert bytes(model.raw(first)) == b"1"
    monkeypatch.setattr(Model, "replaced", property(lambda each: each.path.name == replaced))
    assert bytes(model.raw(first)) == b"1"
    if replaced is None:
        assert bytes(model.raw(second)) == b"2"
    else:
        with pytest.raises(OSError, match="replaced in the store since it was opened: open the model again") as caught:
            model.raw(second)
        assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, str(tmp_path / replaced))
