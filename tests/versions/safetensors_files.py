"""Writes safetensors files, and checks them, by the rules of their reference implementation."""

import json
from collections.abc import Mapping


def file_of(tensors: Mapping[str, bytes], metadata: object = None) -> bytes:
    """A safetensors file as its reference implementation writes it: a header padded to 8 bytes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


def check_reference_rules(file: bytes) -> None:
    """What the reference implementation checks: a header that begins with {, and tensors without holes or overlaps."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    assert file[8:9] == b"{"
    places = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    end = 0
    for begin, stop in places:
        assert begin == end
        end = stop
    assert 8 + length + end == len(file)
