"""Each format gives names, types, shapes and places; what breaks its rules gives one clear error."""

import io
import json
import os
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import model_files
from tests.support.model_files import ARRAYS, BIAS, FILES, WEIGHT, Array
from trimsfs.formats import BufferSource, FormatError, TensorTable, parse
from trimsfs.formats.source import HEADER_LIMIT
from trimsfs.formats.table import MOST_TENSORS


def read(data: bytes, name: str = "model") -> TensorTable:
    return parse(BufferSource(data), name)


def error_of(data: bytes, name: str = "model") -> str:
    with pytest.raises(FormatError) as caught:
        read(data, name)
    text = str(caught.value)
    assert "\n" not in text
    return text


def contents(data: bytes, table: TensorTable) -> dict[str, Array]:
    """What the table says is in a file."""
    return {
        tensor.name: Array(tensor.dtype, tensor.shape, data[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor in table.tensors
    }


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "npy"])
def test_every_tensor_is_found_with_its_bytes(kind: str) -> None:
    name, data = FILES[kind]
    table = read(data, name)
    assert table.format == kind
    assert contents(data, table) == ARRAYS
    assert table.nbytes == sum(len(array.data) for array in ARRAYS.values())


def test_an_npy_file_is_one_tensor_without_a_name() -> None:
    data = model_files.npy()
    assert contents(data, read(data)) == {"": WEIGHT}


def test_the_table_can_be_told_as_json() -> None:
    data = model_files.npy(BIAS)
    entry = {"name": "", "dtype": "int64", "shape": [3], "offset": len(data) - 24, "nbytes": 24}
    assert json.loads(read(data).as_json()) == {"format": "npy", "tensors": [entry]}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_cut_anywhere_gives_an_error_or_fewer_tensors(kind: str) -> None:
    name, data = FILES[kind]
    whole = len(read(data, name).tensors)
    for length in range(len(data)):
        with suppress(FormatError):
            assert len(read(data[:length], name).tensors) < whole or kind == "onnx"


@pytest.mark.parametrize("data", [b"", b"\0", b"hello, world", bytes(100), b"PK\x03\x04", b"GGUF", b"\x93NUMPY"])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    assert error_of(data)


def test_an_unknown_file_names_the_formats_that_are_known() -> None:
    assert error_of(b"#!/bin/sh\necho a script\n") == (
        "unknown format: none of MXNet, safetensors, GGUF, npy, npz, PyTorch and ONNX"
    )


# MXNet


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_every_version_of_mxnet_arrays_is_read(version: int) -> None:
    data = model_files.mxnet(version=version)
    assert contents(data, read(data)) == ARRAYS


def test_mxnet_arrays_without_names_are_numbered() -> None:
    data = model_files.mxnet(named=False)
    assert list(contents(data, read(data))) == ["0", "1", "2"]


def test_an_mxnet_scalar_has_no_dimensions() -> None:
    scalar = {"x": Array("float32", (), struct.pack("<f", 1.5))}
    data = model_files.mxnet(scalar, version=3)
    assert contents(data, read(data)) == scalar


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (16, "<Q", 1 << 60, "file is too small for"),
        (28, "<i", 1, "is sparse"),
        (32, "<i", 33, "33 dimensions"),
        (36, "<q", -2, "an invalid size"),
        (36, "<q", 1 << 62, "too many elements"),
        (36, "<q", 1 << 40, "exceed the file"),
        (60, "<i", 99, "unknown dtype 99"),
    ],
)
def test_a_wrong_mxnet_header_is_refused(offset: int, layout: str, value: int, message: str) -> None:
    data = bytearray(model_files.mxnet())
    struct.pack_into(layout, data, offset, value)
    assert message in error_of(bytes(data))


# safetensors


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not JSON"),
        (b"{" * 100_000, "not JSON"),
        (b'{"a": {"dtype": "F32"}}', "incomplete"),
        (b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}', "an invalid size"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "an invalid size"),
        (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype 'F99'"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "an invalid size"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "4 bytes where its shape needs 8"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "exceed the file of"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "incomplete or invalid"),
    ],
)
def test_a_wrong_safetensors_header_is_refused(header: bytes, message: str) -> None:
    data = struct.pack("<Q", len(header)) + header + bytes(4)
    assert message in error_of(data)


def test_a_header_that_is_too_long_is_not_read() -> None:
    class Endless:
        size = 1 << 50

        def read(self, offset: int, count: int) -> bytes:
            assert count <= HEADER_LIMIT
            return (struct.pack("<Q", 1 << 40) + b"{" * count)[offset : offset + count]

    with pytest.raises(FormatError, match="exceeds 32 MiB"):
        parse(Endless(), "model.safetensors")


# GGUF


def test_a_gguf_tensor_of_quantised_blocks_has_their_size() -> None:
    data = bytearray(model_files.gguf({"q": Array("float32", (2, 32), bytes(256))}))
    at = data.index(struct.pack("<QQIQ", 32, 2, 0, 0)) + 16
    struct.pack_into("<I", data, at, 2)
    (tensor,) = read(bytes(data)).tensors
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("q4_0", (2, 32), 36)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\x03", b"GGUF\x01", "unsupported GGUF version 1"),
        (struct.pack("<II", 4, 64), struct.pack("<II", 4, 48), "not a power of two"),
        (struct.pack("<IIQ", 9, 8, 2), struct.pack("<IIQ", 9, 99, 2), "unknown value type 99"),
        (struct.pack("<IB", 7, 1), struct.pack("<IB", 77, 1), "unknown value type 77"),
        (struct.pack("<IQ", 27, 64), struct.pack("<IQ", 5, 64), "unknown type 5"),
        (struct.pack("<IQ", 27, 64), struct.pack("<IQ", 8, 64), "not whole blocks"),
    ],
)
def test_a_wrong_gguf_header_is_refused(old: bytes, new: bytes, message: str) -> None:
    data = model_files.gguf()
    assert data.count(old) == 1
    assert message in error_of(data.replace(old, new))


# NumPy


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"'<f4'", b"'|O4'", "dtype '|O4' is not supported"),
        (b"'<f4'", b"'>f4'", "dtype '>f4' is not supported"),
        (b"(2, 3)", b"(2, -3", "not a dictionary"),
        (b"(2, 3)", b"[2, 3]", "incomplete"),
        (b"False", b"True ", "Fortran order"),
        (b"\x01\x00v", b"\x03\x00v", "its header of"),
    ],
)
def test_a_wrong_npy_header_is_refused(old: bytes, new: bytes, message: str) -> None:
    data = model_files.npy()
    assert data.count(old) == 1
    assert message in error_of(data.replace(old, new))


def test_compressed_members_are_not_mapped() -> None:
    assert "is compressed: save it with numpy.savez" in error_of(model_files.npz(compression=zipfile.ZIP_DEFLATED))


# PyTorch


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickles_is_read(protocol: int) -> None:
    data = model_files.torch(protocol=protocol)
    assert contents(data, read(data)) == ARRAYS


def test_tensors_in_dictionaries_are_named_by_all_keys() -> None:
    data = model_files.torch(nested=True)
    assert set(contents(data, read(data))) == {f"state.{name}" for name in ARRAYS}


def in_archive(pickled: bytes) -> bytes:
    """A PyTorch file with that pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return file.getvalue()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", "invalid pickle"),
        (b"\x80\x02}K\x01a.", "elements for a value that is not a container"),
        (b"\x80\x02]K\x01K\x02s.", "elements for a value that is not a container"),
        (b"\x80\x02K\x01K\x02u.", "invalid pickle"),
        (b"\x80\x02(K\x01K\x02K\x03d.", "invalid pickle"),
        (b"\x80\x02}r\xff\xff\xff\xff0.", "invalid pickle"),
        (b"\x80\x02h\x07.", "memo 7 is empty"),
        (b"\x80\x02cos\nsystem\nX\x09\0\0\0touch ran\x85R.", "no dictionary of tensors"),
        (b"\x80\x02cos\nmkdir\nX\x03\0\0\0ran\x85R.", "no dictionary of tensors"),
        (b"\x80\x02}.", "no dictionary of tensors"),
        (b"\x80\x02} \x8b\x00\x08\x00\x00" + b"\x01" * 2048 + b"K\x01s.", "invalid pickle"),
        (b"\x80\x02}\x8b\x00\x08\x00\x00" + b"\x01" * 2048 + b"K\x01s.", "no dictionary of tensors"),
    ],
)
def test_a_pickle_is_never_run(pickled: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(in_archive(pickled))
    assert os.listdir() == []


def test_a_pickle_of_containers_in_each_other_is_read_in_time() -> None:
    doubling = b"\x80\x02]q\x000" + b"".join(b"](h%ch%ceq%c0" % (n, n, n + 1) for n in range(200)) + b"h\xc8."
    assert "no dictionary of tensors" in error_of(in_archive(doubling))


# ONNX


def test_external_tensors_name_their_file() -> None:
    entries = {"location": "weights/model.bin", "offset": "4096", "length": "24"}
    (tensor,) = read(model_files.onnx({"w": WEIGHT}, external=entries), "model.onnx").tensors
    assert (tensor.file, tensor.offset, tensor.nbytes) == ("weights/model.bin", 4096, 24)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "is in '.', which is not a path below"),
        ({"location": "/etc/passwd"}, "which is not a path below the model"),
        ({"location": "../other/model.bin"}, "which is not a path below the model"),
        ({"location": "a/../../b"}, "which is not a path below the model"),
        ({"location": "w", "offset": "-1"}, "is not a size in bytes"),
        ({"location": "w", "offset": "9" * 30}, "is not a size in bytes"),
        ({"location": "w", "length": "25"}, "25 bytes where its shape needs 24"),
    ],
)
def test_a_wrong_external_tensor_is_refused(entries: dict[str, str], message: str) -> None:
    assert message in error_of(model_files.onnx({"w": WEIGHT}, external=entries), "model.onnx")


# Hostile files


@pytest.mark.timeout(20)
def test_one_header_for_many_members_does_not_take_for_ever() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("0.npy", model_files.npy())
        first = archive.infolist()[0]
        for number in range(1, 20_000):
            other = zipfile.ZipInfo(f"{number}.npy")
            other.header_offset, other.file_size, other.compress_size = 0, first.file_size, first.file_size
            other.CRC, other.create_version, other.extract_version = first.CRC, 20, 20
            archive.filelist.append(other)
            archive._didModify = True  # type: ignore[attr-defined]
    assert len(read(file.getvalue()).tensors) == 20_000


@pytest.mark.parametrize(
    "header",
    [
        b"{[]: 1}",
        b"{{}}",
        b"1" + b"0" * 400 + b"+1j",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-0x%s,)}" % (b"f" * 3900),
    ],
)
def test_an_npy_header_that_python_chokes_on_is_refused(header: bytes) -> None:
    assert error_of(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def test_a_header_of_as_many_tensors_as_there_may_be_is_read() -> None:
    arrays = {f"model.layers.{number}.weight": Array("float32", (0, 3, 3, 1), b"") for number in range(MOST_TENSORS)}
    assert len(read(model_files.safetensors(arrays)).tensors) == MOST_TENSORS
