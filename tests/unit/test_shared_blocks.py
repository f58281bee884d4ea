"""The client maps blocks that the mount says two models share, of the generations that it names alone."""

import io
import json
import mmap
import os
from pathlib import Path

import pytest

from trimsfs.client import native, shared_blocks
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

    def read(file: io.FileIO) -> str:
        return "0" if os.path.samestat(os.fstat(file.fileno()), model.stat()) else "1"

    monkeypatch.setattr(shared_blocks, "generation_of", read)


def map_shared(model: Path) -> int:
    with model.open("rb", buffering=0) as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return shared_blocks.map_shared(model, file, mapping)


def test_a_file_on_no_mount_shares_nothing(model: Path) -> None:
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
