"""What the control surface tells of the tensors in a file."""

import gc
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import model_files
from tests.support.model_files import ARRAYS
from tests.support.parts import until
from tests.support.served import Server
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of
from trimsfs.control import tensor_tables
from trimsfs.formats import TensorTable
from trimsfs.formats.source import BLOCK


@pytest.fixture
def store() -> MemoryStore:
    models = {f"models/{kind}/{name}": data for kind, (name, data) in model_files.FILES.items()}
    long = model_files.safetensors() + bytes(2 * BLOCK)
    return MemoryStore({**models, "long.safetensors": long, "notes.txt": b"no model at all", "nothing": b""})


async def tensors(server: Server, path: str) -> dict[str, Any]:
    """The table of a file, as the control file and the attribute give it."""
    directory, _, name = path.rpartition("/")
    text = await server.content(f"{directory}/.trims/{name}/tensors".removeprefix("/"))
    assert await server.attribute(path, "tensors") == text.decode()
    table: dict[str, Any] = json.loads(text)
    return table


@pytest.mark.parametrize("kind", model_files.FILES)
async def test_a_model_has_a_table_of_its_tensors(server: Server, kind: str) -> None:
    name, data = model_files.FILES[kind]
    table = await tensors(server, f"models/{kind}/{name}")
    assert table["format"] == kind
    for entry in table["tensors"]:
        array = ARRAYS[entry["name"] or "net.weight"]
        assert (entry["dtype"], entry["shape"]) == (array.dtype, list(array.shape))
        assert data[entry["offset"] : entry["offset"] + entry["nbytes"]] == array.data


@pytest.mark.parametrize(("path", "told"), [("notes.txt", "unknown format"), ("nothing", "empty file")])
async def test_what_is_no_model_says_so(server: Server, path: str, told: str) -> None:
    table = await tensors(server, path)
    assert (table["format"], told in table["error"]) == (None, True)


async def test_a_table_costs_no_more_than_its_header(server: Server, store: MemoryStore, chunk_size: int) -> None:
    assert chunk_size < BLOCK
    await tensors(server, "long.safetensors")
    assert max(store.reads()) < BLOCK


async def test_what_was_told_of_wrong_bytes_is_not_told_for_ever(server: Server, store: MemoryStore) -> None:
    data = store.contents["long.safetensors", store.generation("long.safetensors").etag]
    store.digests["long.safetensors"] = digest_of(data, "sha256")
    store.corrupt("long.safetensors", data.index(b'"dtype"') + 2)
    assert (await tensors(server, "long.safetensors"))["format"] is None
    await server.content("long.safetensors")
    await until(lambda: server.integrity.statistics().compared == 1)
    assert await server.content("long.safetensors") == data
    assert (await tensors(server, "long.safetensors"))["format"] == "safetensors"


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread of each table that is made."""
    threads: list[threading.Thread] = []
    real: Callable[[TensorTable], bytes] = TensorTable.as_json

    def as_json(table: TensorTable) -> bytes:
        threads.append(threading.current_thread())
        return real(table)

    monkeypatch.setattr(TensorTable, "as_json", as_json)
    return threads


async def test_a_table_is_made_beside_the_event_loop(server: Server, rendered: list[threading.Thread]) -> None:
    await tensors(server, "long.safetensors")
    assert len(rendered) == 1
    assert rendered[0] is not threading.current_thread()


async def test_opens_at_the_same_time_share_a_large_table(
    server: Server, rendered: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_tables, "LONGEST_REMEMBERED", 0)
    handles = [await server.open(".trims/long.safetensors/tensors") for _ in range(3)]
    assert len({await server.read(handle) for handle in handles}) == len(rendered) == 1
    for handle in handles:
        server.release(handle)
    gc.collect()
    await tensors(server, "long.safetensors")  # the control file, then the attribute: nobody has it any more
    assert len(rendered) == 3
