"""Open files that lose bytes, or go on under the next server: what comes is compared, what is here goes on."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import trio

from tests.support.parts import blob_of, fail_to_sync, until
from tests.support.served import Serving
from tests.support.signing import sign
from tests.support.stores import MemoryStore
from tests.unit.signature_policy.common import KEY, opened_and_lost
from trimsfs.errors import BlobDamagedError, StoreUnavailableError, TrimsError
from trimsfs.handover.ledger import Ledger


@pytest.mark.parametrize("what", ["signed", "without"])
async def test_an_open_file_that_is_here_goes_on_under_the_next_server_while_the_store_is_away(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], what: str, ledger: Callable[[], Ledger]
) -> None:
    serving = partial(serving, backing=None, signatures="require" if what == "signed" else "check")
    path = "signed/params" if what == "signed" else "other/params"
    async with serving(ledger=ledger()) as server:
        handle = await server.open(path)
        assert await server.read(handle, 0, 10**6) == files["params"]
        await server.disk.flush()
    store.fail(StoreUnavailableError("the store is down"), times=float("inf"))
    async with serving(ledger=ledger()) as server:
        assert bytes(await server.filesystem.files.read(handle, 0, 10**6)) == files["params"]


async def test_an_open_file_that_is_here_goes_on_under_the_next_server_though_another_has_been_signed(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], ledger: Callable[[], Ledger]
) -> None:
    serving = partial(serving, backing=None)
    async with serving(ledger=ledger()) as server:
        handle = await server.open("signed/params")
        assert await server.read(handle, 0, 10**6) == files["params"]
        await server.disk.flush()
    new = files | {"params": files["params"][::-1]}  # a new release of the model, signed anew
    store.put("signed/params", new["params"])
    store.put("signed/model.sig", sign(KEY, new))
    async with serving(ledger=ledger()) as server:
        assert bytes(await server.filesystem.files.read(handle, 0, 10**6)) == files["params"]


async def test_a_second_reader_does_not_get_what_is_being_compared_for_the_first(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], chunk_size: int
) -> None:
    async with serving(backing=None) as server:
        handle, blob = await opened_and_lost(server)
        store.contents["signed/params", store.generation("signed/params").etag] = b"evil" + files["params"][4:]
        await trio.sleep(1.1)  # room is looked for again
        found, real = [], server.integrity.comparer._copier.digest

        async def slow(*arguments: object) -> object:
            await trio.sleep(0.3)  # a large file
            return await real(*arguments)  # type: ignore[arg-type]

        server.integrity.comparer._copier.digest = slow  # type: ignore[method-assign, assignment]

        async def read() -> None:
            with suppress(TrimsError):
                found.append(await server.read(handle, 0, chunk_size))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await until(lambda: blob.complete)
            nursery.start_soon(read)
        assert found in ([], [files["params"][:chunk_size]]), "a program has read what nobody has signed"


async def test_a_read_does_not_wait_for_the_kernel_that_waits_for_the_read(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.COMPARED_WITHIN_S", 0.5)
    async with serving(backing=None) as server:
        handle, blob = await opened_and_lost(server)
        await trio.sleep(1.1)  # room is looked for again
        answered = trio.Event()

        async def forget_pages(_generation: object) -> None:
            await answered.wait()  # the page is locked until the read of it has been answered

        monkeypatch.setattr(server.gpu, "compare", forget_pages)
        store.corrupt("signed/params", 77)  # one bit flips on the way
        with trio.fail_after(10), suppress(BlobDamagedError):  # unless another comparison has come to its end
            await server.read(handle, 0, chunk_size)
        answered.set()
        await until(lambda: blob.health.compared)
        assert await server.read(handle, 0, chunk_size) == files["params"][:chunk_size]


async def test_an_open_file_goes_on_with_its_version_though_another_has_been_signed(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], chunk_size: int
) -> None:
    store.put("signed/params", files["params"], version_id="v1")
    async with serving(backing=None) as server:
        handle = await server.open("signed/params")
        assert await server.read(handle, 0, 10**6) == files["params"]
        blob = blob_of(server.disk, store, "signed/params")

        await fail_to_sync(server.disk, blob)
        assert not blob.complete
        await trio.sleep(1.1)  # room is looked for again
        new = files | {"params": files["params"][::-1]}  # a new release of the model, signed anew
        store.put("signed/params", new["params"], version_id="v2")
        store.put("signed/model.sig", sign(KEY, new))
        assert await server.read(handle, 0, chunk_size) == files["params"][:chunk_size]
