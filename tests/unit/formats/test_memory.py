"""A hostile file takes no more memory than a long description of tensors may, and is refused in time."""

import io
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import trimsfs.formats
from tests.support.model_files import field
from trimsfs.formats import BufferSource, FormatError, parse
from trimsfs.formats.archive import MEMBER_LIMIT
from trimsfs.formats.source import HEADER_LIMIT
from trimsfs.formats.table import MOST_TENSORS

MOST = 12 * HEADER_LIMIT
"""Bytes that a parser may take besides the file."""
NO_MORE = 2 << 30
"""Address space of a parser that would take more, so that it does not fill the host."""
CHILD = f"""
import resource, sys
from trimsfs.formats import BufferSource, FormatError, load_readers, parse

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

load_readers()
with open(sys.argv[1], "rb") as file:
    source = BufferSource(file.read())
resource.setrlimit(resource.RLIMIT_AS, ({NO_MORE}, {NO_MORE}))
before, refused = peak(), ""
try:
    parse(source, sys.argv[1])
except FormatError as error:
    refused = str(error)
print(peak() - before, refused)
"""


def torch(pickled: bytes) -> bytes:
    """A PyTorch file with that pickle, and a storage of one element."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(4))
    return file.getvalue()


def repeated(opcodes: bytes, before: bytes = b"") -> bytes:
    """A PyTorch file whose pickle is as long as one may be."""
    return torch(before + opcodes * ((MEMBER_LIMIT - len(before)) // len(opcodes)))


def text(value: bytes) -> bytes:
    """The opcode that makes a string."""
    return b"X" + struct.pack("<I", len(value)) + value


STORAGE = text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\1t"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((" + STORAGE + b"QK\0))\x89NtRq\0"


def names_of_a_long_key() -> bytes:
    entries = b"".join(text(b"%x" % number) + b"h\0" for number in range(MOST_TENSORS))
    return torch(b"\x80\2" + TENSOR + b"0}" + text(b"k" * 4000) + b"}(" + entries + b"us.")


def a_name_of_long_keys() -> bytes:
    key = text(b"k" * (15 << 20)) + b"q\1"
    return torch(b"\x80\2" + TENSOR + b"0" + key + b"0" + b"}h\1" * 30 + b"h\0" + b"s" * 30 + b".")


def globals_of_long_strings() -> bytes:
    return torch(b"\x80\4" + text(b"m" * 500_000) + b"\x940" + (b"h\0h\0\x93" * 100_000) + b".")


def safetensors(item: str) -> Callable[[], bytes]:
    def made() -> bytes:
        items = item * ((HEADER_LIMIT - 100) // len(item.encode()))
        header = f'{{"a":[{items.rstrip(",")}]}}'.encode()
        return struct.pack("<Q", len(header)) + header

    return made


def safetensors_of_many_names() -> bytes:
    header = ("{" + ",".join(f'"{number:x}":1e9' for number in range(2_500_000)) + "}").encode()
    return struct.pack("<Q", len(header)) + header


def members(count: int) -> bytes:
    """A zip archive of as many members as it tells in its list only."""
    listed = b"".join(
        struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, *[0] * 8, 3, *[0] * 6) + b"%03x" % (number % 4096)
        for number in range(count)
    )
    return b"PK\3\4" + listed + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(listed), 4, 0)


def gguf() -> bytes:
    count = 1_000_000
    return b"GGUF" + struct.pack("<IQQ", 3, count, 0) + struct.pack("<QIIQ", 0, 0, 0, 0) * count


def mxnet() -> bytes:
    count = 1_000_000
    array = struct.pack("<IiiqiiI", 0xF993FAC9, 0, 1, 0, 1, 0, 0)
    return struct.pack("<QQQ", 0x112, 0, count) + array * count


def onnx() -> bytes:
    return field(7, field(5, field(1, 0) + field(2, 1) + field(9, b"")) * 2_000_000)


FILES: Mapping[str, Callable[[], bytes]] = {
    "lists.pt": lambda: repeated(b"]"),
    "texts.pt": lambda: repeated(b"\x8c\2\xc4\x80\x94"),
    "memo.pt": lambda: repeated(b"\x94", b"N"),
    "globals.pt": globals_of_long_strings,
    "names.pt": names_of_a_long_key,
    "name.pt": a_name_of_long_keys,
    "objects.safetensors": safetensors("{},"),
    "lists.safetensors": safetensors("[[]],"),
    "texts.safetensors": safetensors('"\u0100",'),
    "names.safetensors": safetensors_of_many_names,
    "members.npz": lambda: members(HEADER_LIMIT // 50),
    "arrays.params": mxnet,
    "tensors.gguf": gguf,
    "tensors.onnx": onnx,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_takes_little_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name]())
    command = [sys.executable, "-c", CHILD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    taken, _, refused = done.stdout.strip().partition(" ")
    print(f"{name}: {int(taken) >> 20} MiB: {refused}")
    assert int(taken) < MOST
    assert refused


def test_a_parser_without_memory_refuses_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def parser(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(trimsfs.formats, "_reader", lambda _: parser)
    with pytest.raises(FormatError, match="not enough memory"):
        parse(BufferSource(b"GGUF"), "model.gguf")
