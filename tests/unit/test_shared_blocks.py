"""What the client reads of attributes, also where the package for that is missing."""

import errno
import json
import logging
import mmap
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trimsfs.client import shared_blocks
from trimsfs.client.xattrs import read_attribute

SIZE = 2 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model beside which there is a listing of what it shares with another, as on a mount."""
    for name in ("model", "other"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    listing = tmp_path / ".trims/model/shared"
    listing.parent.mkdir(parents=True)
    listing.write_text(json.dumps({"path": "other", "generation": "1", "parts": [[0, 0, SIZE]]}))
    return tmp_path / "model"


def map_shared(model: Path) -> int:
    with model.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return shared_blocks.map_shared(model, model.stat().st_ino, mapping)


def test_a_file_on_no_mount_has_no_attribute(model: Path) -> None:
    descriptor = os.open(model, os.O_RDONLY)
    try:
        for file in (model, descriptor):
            with pytest.raises(OSError, match=r"No data|not supported") as raised:
                read_attribute(file, "generation")
            assert raised.value.errno in {errno.ENODATA, errno.EOPNOTSUPP}
    finally:
        os.close(descriptor)
    assert map_shared(model) == 0


def test_only_the_generation_that_the_mount_tells_is_mapped(model: Path) -> None:
    other = model.with_name("other")
    try:
        os.setxattr(other, "user.trims.generation", b"2")
    except OSError as error:
        pytest.skip(f"{model.parent}: {error.strerror}")
    assert map_shared(model) == 0
    os.setxattr(other, "user.trims.generation", b"1")
    assert map_shared(model) == SIZE


def test_without_the_package_the_model_is_mapped_by_itself(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "xattr", None)
    shared_blocks._warn_of_missing_package.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert (map_shared(model), map_shared(model)) == (0, 0)
    (record,) = caplog.records
    assert "pip install xattr" in record.getMessage()


def test_another_module_of_that_name_does_no_harm(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_blocks._warn_of_missing_package.cache_clear()
    monkeypatch.setitem(sys.modules, "xattr", ModuleType("xattr"))
    assert map_shared(model) == 0
