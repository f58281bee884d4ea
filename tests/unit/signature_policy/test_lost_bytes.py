"""Open files that have lost bytes, or were mended with others, are compared, and go on."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_of, flip_byte, nothing, until
from tests.support.served import Server, Serving
from tests.support.signing import sign
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of
from tests.unit.signature_policy.common import KEY, cached, opened_and_lost
from trimsfs.errors import StoreUnavailableError, TrimsError
from trimsfs.handover.ledger import Ledger
from trimsfs.stores.digests import compute


async def goes_on(server: Server, handle: int, size: int, expected: bytes, tries: int = 4) -> list[object]:
    errors: list[object] = []
    for _ in range(tries):
        try:
            assert await server.read(handle, 0, size) == expected
        except TrimsError as error:
            errors.append(error)
            await trio.sleep(0.3)
        else:
            return []
    return errors


async def test_one_failure_of_the_store_does_not_deny_an_open_file_for_ever(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.COMPARED_WITHIN_S", 1.0)
    async with serving(backing=None) as server:
        handle, blob = await opened_and_lost(server)
        await trio.sleep(1.1)  # room is looked for again
        # the last chunk cannot be had for a moment
        store.fail(StoreUnavailableError("away"), method="read", key="signed/params", offset=2 * chunk_size, times=1)
        store.fail(StoreUnavailableError("away"), method="read", key="signed/params", offset=chunk_size, times=1)
        errors = await goes_on(server, handle, chunk_size, files["params"][:chunk_size])
        assert not errors, (errors, list(blob.states), blob.health.digest)


async def test_what_was_read_before_it_was_compared_is_not_given_after(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path, ledger: Callable[[], Ledger]
) -> None:
    serving = partial(serving, backing=None)
    async with serving(ledger=ledger()) as server:
        handle = await server.open("signed/params")
        assert await server.read(handle, 0, 10**6) == files["params"]
        await server.disk.flush()
    file = cached(tmp_path, files["params"])
    flip_byte(file, 5)
    store.corrupt("signed/params", 77)  # one bit flips on the way
    async with serving(ledger=ledger()) as server:
        signature_policy = server.filesystem._trust.signature_policy
        assert signature_policy is not None
        blob = next(one.blob for one in server.filesystem.handles.files.values())
        server.fetcher._batches._completed = nothing  # it is compared for the open alone
        real, gate, asked = signature_policy.manifests.signed, trio.Event(), []

        async def signed(generation: object) -> object:
            found = await real(generation)  # type: ignore[arg-type]
            asked.append(found)
            if len(asked) == 1:
                await gate.wait()
            return found

        signature_policy.manifests.signed = signed  # type: ignore[method-assign, assignment]
        result: list[bytes] = []

        async def read() -> None:
            result.append(bytes(await server.filesystem.files.read(handle, 0, 10**6)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await until(lambda: len(asked) > 0)
            async with server.disk.using(store.generation("signed/params")) as one:
                await signature_policy.admit(one, nullcontext)  # another opens it
            assert blob.health.digest
            gate.set()
        assert result == [files["params"]], "wrong bytes"


async def test_a_comparison_that_began_before_the_file_was_signed_does_not_deny_it(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.COMPARED_WITHIN_S", 1.0)
    gate, began = threading.Event(), threading.Event()

    def computed(descriptor: int, size: int, algorithm: str, part_size: int) -> bytes | None:
        if algorithm == "md5":
            began.set()
            assert gate.wait(20)
        return compute(descriptor, size, algorithm, part_size)  # type: ignore[arg-type]

    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.compute", computed)
    monkeypatch.setattr("trimsfs.integrity.integrity.SMALL", 0)
    store.digests["other/params"] = digest_of(files["params"], "md5", certain=False)
    async with serving(backing=None, signatures="check") as server:
        first = await server.open("other/params")
        assert await server.read(first, 0, chunk_size) == files["params"][:chunk_size]
        await server.read(first, 0, 10**6)
        await until(began.is_set)
        store.put("other/model.sig", sign(KEY, files))
        done = []

        async def reader() -> None:
            handle = await server.open("other/params")
            assert await server.read(handle, 0, chunk_size) == files["params"][:chunk_size]
            done.append(handle)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            with trio.move_on_after(5):
                await until(lambda: bool(done))
            opened = bool(done)
            gate.set()
        await until(lambda: server.integrity.statistics().to_compare == 0)
        blob = blob_of(server.disk, store, "other/params")
        errors = await goes_on(server, done[0], chunk_size, files["params"][:chunk_size])
        assert not errors, (opened, errors, blob.health.digest)


async def test_what_was_not_signed_for_a_moment_is_compared_once_it_is_again(
    serving: Serving,
    store: MemoryStore,
    files: dict[str, bytes],
    chunk_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ledger: Callable[[], Ledger],
) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.COMPARED_WITHIN_S", 1.0)
    serving = partial(serving, backing=None)
    async with serving(ledger=ledger()) as server:
        handle = await server.open("signed/params")
        assert await server.read(handle, 0, 10**6) == files["params"]
        await server.disk.flush()
    file = cached(tmp_path, files["params"])
    flip_byte(file, 5)
    store.put("signed/model.sig", sign(KEY, {name: data for name, data in files.items() if name != "params"}))
    async with serving(ledger=ledger()) as server:
        with pytest.raises(TrimsError):
            await server.filesystem.files.read(handle, 0, 10**6)
        await trio.sleep(0.5)
        store.put("signed/model.sig", sign(KEY, files) + b"\n")
        errors = []
        for _ in range(4):
            try:
                assert bytes(await server.filesystem.files.read(handle, 0, 10**6)) == files["params"]
            except TrimsError as error:
                errors.append(error)
                await trio.sleep(0.3)
            else:
                break
        assert len(errors) < 2, errors


async def test_a_verify_that_is_closed_does_not_deny_what_it_has_mended(
    serving: Serving,
    store: MemoryStore,
    files: dict[str, bytes],
    chunk_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.COMPARED_WITHIN_S", 1.0)
    async with serving(backing=None) as server:
        handle = await server.open("signed/params")
        blob = blob_of(server.disk, store, "signed/params")
        file = cached(tmp_path, files["params"])
        flip_byte(file, 5)
        flip_byte(file, 2 * chunk_size + 5)
        store.corrupt("signed/params", 77)
        gate = store.block(method="read", key="signed/params", offset=2 * chunk_size)
        path = await server.control_file("signed/params", "verify")
        with trio.move_on_after(3):
            command = await server.open(path)
            await until(lambda: gate.statistics().tasks_waiting > 0)
        assert server.integrity.statistics().repaired_chunks == 1
        server.release(command)
        await trio.sleep(0.3)
        flip_byte(file, 2 * chunk_size + 5)  # is right again
        gate.set()
        errors = await goes_on(server, handle, chunk_size, files["params"][:chunk_size])
        assert not errors, (errors, blob.health.digest, blob.health.quarantine, list(blob.states))


async def test_a_slow_scrub_does_not_deny_what_it_has_mended(
    serving: Serving,
    store: MemoryStore,
    files: dict[str, bytes],
    chunk_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large file is scrubbed for hours."""
    monkeypatch.setattr("trimsfs.integrity.signature_policy.COMPARED_WITHIN_S", 1.0)
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)
    async with serving(backing=None, scrub_interval=1.0) as server:
        handle = await server.open("signed/params")
        blob = blob_of(server.disk, store, "signed/params")
        server.integrity.scrubber._rate = chunk_size // 4  # four seconds a chunk
        file = cached(tmp_path, files["params"])
        flip_byte(file, 5)
        store.corrupt("signed/params", 77)
        await server.disk.flush()
        await until(lambda: server.integrity.statistics().repaired_chunks == 1)
        errors = await goes_on(server, handle, chunk_size, files["params"][:chunk_size])
        server.integrity.scrubber._rate = 1 << 40
        assert not errors, (errors, blob.health.digest, blob.health.quarantine, list(blob.states))
