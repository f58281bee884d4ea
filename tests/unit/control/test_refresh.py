"""Refreshing: the store is asked at the next use, whatever is believed."""

import json

import pytest

from tests.support.served import Server, Serving
from tests.support.stores import MemoryStore
from trimsfs.errors import NoSuchEntryError, TransientStoreError


async def generation(server: Server, path: str) -> str | None:
    return await server.attribute(path, "generation")


@pytest.mark.parametrize("path", ["net/params", "net", ""])
async def test_what_was_replaced_uploaded_or_deleted_is_seen_at_once(
    server: Server, store: MemoryStore, path: str
) -> None:
    before = await generation(server, "net/params")
    assert await server.listing("net/deep") == ["er"]
    await server.find("other/params")
    store.put("net/params", b"replaced")
    store.put("net/new", b"uploaded")
    store.delete("net/deep/er/weights")
    assert await generation(server, "net/params") == before

    assert await server.command("refresh", path) == [{"path": f"{path}/" if path == "net" else path, "state": "done"}]

    assert await generation(server, "net/params") != before
    if path != "net/params":
        assert await server.content("net/new") == b"uploaded"
        with pytest.raises(NoSuchEntryError):
            await server.find("net/deep")
    told = {name.decode() for _, name in server.expired}
    assert told == {"net/params": {"params"}, "net": {"net", "params", "deep"}}.get(
        path, {"net", "params", "deep", "other"}
    )


async def test_nothing_that_is_known_is_lost_while_the_store_is_away(serving: Serving, store: MemoryStore) -> None:
    async with serving(retry_deadline=0.05) as server:
        before = await generation(server, "net/params")
        await server.listing("net")
        store.fail(TransientStoreError("503"), times=float("inf"))
        for path in ("net/params", "net", ""):
            await server.command("refresh", path)
            assert await generation(server, "net/params") == before
            assert "params" in await server.listing("net")
        with pytest.raises(NoSuchEntryError):
            await server.find("net/absent")
        store.heal()


async def test_single_names_of_a_large_directory_are_refreshed_too(serving: Serving, chunk_size: int) -> None:
    store = MemoryStore({f"large/{number:04}": b"x" for number in range(1100)})
    async with serving(store=store) as server:
        before = await generation(server, "large/0007")
        store.put("large/0007", b"replaced")
        assert await generation(server, "large/0007") == before
        await server.command("refresh", "large")
        assert await generation(server, "large/0007") != before
        assert json.loads(await server.content(".trims/control"))["store_problem"] is None
