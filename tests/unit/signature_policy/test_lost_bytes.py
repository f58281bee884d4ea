"""Open files that have lost bytes, or were mended with others, are compared, and go on."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import trio

from tests.support.held import Held, begin, reached
from tests.support.parts import nothing, until
from tests.support.served import Server
from tests.unit.integrity.common import digest_of
from tests.unit.signature_policy.common import PARAMS, Scene, policy_of
from trimsfs.errors import StoreUnavailableError, TrimsError
from trimsfs.fetch.processes import thread_copier
from trimsfs.handover.ledger import Ledger


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.COMPARED_WITHIN_S", 1.0)


async def errors_until_right(server: Server, handle: int, expected: bytes) -> list[TrimsError]:
    """Read an open file until it gives the right bytes, four times at most: what the failing reads raised."""
    errors: list[TrimsError] = []
    for _ in range(4):
        try:
            assert bytes(await server.filesystem.files.read(handle, 0, len(expected))) == expected
        except TrimsError as error:
            errors.append(error)
            await trio.sleep(0.3)
        else:
            return errors
    pytest.fail(f"still denied: {errors}")


async def test_one_failure_of_the_store_does_not_deny_an_open_file_for_ever(scene: Scene) -> None:
    async with scene.serving(backing=None) as server:
        handle, _ = await scene.opened_and_lost(server)
        await trio.sleep(1.1)  # room is looked for again
        for chunk in (2, 1):  # cannot be had for a moment
            offset = chunk * scene.chunk_size
            scene.store.fail(StoreUnavailableError("away"), method="read", key=PARAMS, offset=offset, times=1)
        await errors_until_right(server, handle, scene.chunk)


async def test_what_was_read_before_it_was_compared_is_not_given_after(
    scene: Scene, ledger: Callable[[], Ledger]
) -> None:
    serving = partial(scene.serving, backing=None)
    async with serving(ledger=ledger()) as server:
        handle = await server.open(PARAMS)
        assert await server.read(handle, 0, 10**6) == scene.params
        await server.disk.journal.flush()
    scene.damage()
    scene.store.corrupt(PARAMS, 77)  # one bit flips on the way
    async with serving(ledger=ledger()) as server:
        policy = policy_of(server)
        blob = next(one.blob for one in server.filesystem.handles.files.values())
        server.fetcher._batches._completed = nothing  # it is compared for the open alone
        real, gate, asked = policy.manifests.signed, trio.Event(), []

        async def signed(generation: object) -> object:
            found = await real(generation)  # type: ignore[arg-type]
            asked.append(found)
            if len(asked) == 1:
                await gate.wait()
            return found

        policy.manifests.signed = signed  # type: ignore[method-assign, assignment]
        async with trio.open_nursery() as nursery:
            reading = begin(nursery, server.filesystem.files.read, handle, 0, 10**6)
            await reached(gate)
            async with server.disk.blobs.using(scene.store.generation(PARAMS)) as one:
                await policy.admit(one, nullcontext)  # another opens it
            assert blob.health.digest
            gate.set()
        assert [bytes(found) for found in reading] == [scene.params], "wrong bytes"


async def test_a_comparison_that_began_before_the_file_was_signed_does_not_deny_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    digesting = Held(monkeypatch, thread_copier, "compute", times=1)  # by MD5
    monkeypatch.setattr("trimsfs.integrity.integrity.SMALL", 0)
    scene.store.digests["other/params"] = digest_of(scene.params, "md5", certain=False)
    async with scene.serving(backing=None, signatures="check") as server:

        async def read() -> int:
            handle = await server.open("other/params")
            assert await server.read(handle, 0, scene.chunk_size) == scene.chunk
            return handle

        await server.read(await read(), 0, 10**6)
        await digesting.reached()
        scene.sign("other")
        async with trio.open_nursery() as nursery:
            handles = begin(nursery, read)
            with trio.move_on_after(5):
                await until(lambda: bool(handles))
            digesting.go.set()
        await until(lambda: server.integrity.statistics().to_compare == 0)
        assert await errors_until_right(server, handles[0], scene.chunk) == []


async def test_what_was_not_signed_for_a_moment_is_compared_once_it_is_again(
    scene: Scene, ledger: Callable[[], Ledger]
) -> None:
    serving = partial(scene.serving, backing=None)
    async with serving(ledger=ledger()) as server:
        handle = await server.open(PARAMS)
        assert await server.read(handle, 0, 10**6) == scene.params
        await server.disk.journal.flush()
    scene.damage()
    scene.sign(params=None)
    async with serving(ledger=ledger()) as server:
        with pytest.raises(TrimsError):
            await server.filesystem.files.read(handle, 0, 10**6)
        await trio.sleep(0.5)
        scene.sign()
        errors = await errors_until_right(server, handle, scene.params)
        assert len(errors) < 2, errors


async def test_a_verify_that_is_closed_does_not_deny_what_it_has_mended(scene: Scene) -> None:
    async with scene.serving(backing=None) as server:
        handle = await server.open(PARAMS)
        scene.damage()
        scene.damage(2)
        scene.store.corrupt(PARAMS, 77)
        gate = scene.store.block(method="read", key=PARAMS, offset=2 * scene.chunk_size)
        path = await server.control_file(PARAMS, "verify")
        with trio.move_on_after(3):
            command = await server.open(path)
            await reached(gate)
        assert server.integrity.statistics().repaired_chunks == 1
        server.release(command)
        await trio.sleep(0.3)
        scene.damage(2)  # is right again
        gate.set()
        await errors_until_right(server, handle, scene.chunk)


async def test_a_slow_scrub_does_not_deny_what_it_has_mended(scene: Scene) -> None:
    """A large file is scrubbed for hours."""
    async with scene.serving(backing=None, scrub_interval=1.0) as server:
        handle = await server.open(PARAMS)
        server.integrity.scrubber._rate = scene.chunk_size // 4  # four seconds a chunk
        scene.damage()
        scene.store.corrupt(PARAMS, 77)
        await server.disk.journal.flush()
        await until(lambda: server.integrity.statistics().repaired_chunks == 1)
        await errors_until_right(server, handle, scene.chunk)
        server.integrity.scrubber._rate = 1 << 40
