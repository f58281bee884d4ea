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

from trimsfs.client import native, shared_blocks
from trimsfs.client.file_attributes import read_attribute
from trimsfs.extras.folding import folding

SIZE = 2 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model beside which there is a listing of what it shares with another, as on a mount."""
    for name in ("model", "other"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    listing = tmp_path / ".trims/model/shared"
    listing.parent.mkdir(parents=True)
    listing.write_text(json.dumps({"of": "0", "path": "other", "generation": "1", "parts": [[0, 0, SIZE]]}))
    return tmp_path / "model"


@pytest.fixture
def generations(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files have the generations that the listing tells."""

    def read(file: int, _: str) -> str:
        return "0" if os.path.samestat(os.fstat(file), model.stat()) else "1"

    monkeypatch.setattr(shared_blocks, "read_attribute", read)


def map_shared(model: Path) -> int:
    with model.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return shared_blocks.map_shared(model, file.fileno(), mapping)


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


def test_only_the_generations_that_the_mount_tells_are_mapped(model: Path) -> None:
    other = model.with_name("other")
    try:
        for of, to in ((b"0", b"2"), (b"2", b"1"), (b"0", b"1")):
            os.setxattr(model, "user.trims.generation", of)
            os.setxattr(other, "user.trims.generation", to)
            assert map_shared(model) == (SIZE if (of, to) == (b"0", b"1") else 0)
    except OSError as error:
        pytest.skip(f"{model.parent}: {error.strerror}")


@pytest.mark.usefixtures("generations")
def test_what_is_not_all_here_is_not_mapped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for state, mapped in ((None, SIZE), (0, 0), (1, SIZE)):
        monkeypatch.setattr("trimsfs.client.file_state._state", lambda _, state=state: state)
        assert map_shared(model) == mapped


@pytest.mark.usefixtures("generations")
def test_a_link_from_elsewhere_leads_to_the_control_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links/link"
    link.symlink_to(model)
    monkeypatch.setattr(native, "ioctl", lambda *_: None)
    mapping = mmap.mmap(-1, mmap.PAGESIZE, access=mmap.ACCESS_COPY)
    assert map_shared(link) == SIZE
    assert shared_blocks.similar_model(link) == model.with_name("other")
    assert folding.Foldable(link, 0, mapping)._derived(link, 2) == tmp_path / ".trims/model/derived-0-2"


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
