"""Leases tell who else has a file open or mapped."""

import os
from pathlib import Path

from trimsfs.tiers.leases import has_other_openers
from trimsfs.tiers.mapping import mapped


def test_a_file_is_in_use_while_it_is_open_or_mapped(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 8192)
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert not has_other_openers(descriptor)
        with path.open("rb") as file:
            assert has_other_openers(descriptor)
            view = mapped(file.fileno(), 8192)
        assert has_other_openers(descriptor)
        assert bytes(view[:2]) == b"xx"
        del view
        assert not has_other_openers(descriptor)
        named = os.open(path, os.O_PATH)
        assert not has_other_openers(descriptor)
        os.close(named)
    finally:
        os.close(descriptor)
