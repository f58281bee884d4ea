"""Signed files that are damaged, lost, closed or signed anew just as they are looked at."""

import errno
import os
from contextlib import nullcontext

import pytest
import trio

from tests.support.held import reached
from tests.support.parts import until
from tests.support.served import FakeBacking, Signal
from tests.unit.integrity.common import digest_of
from tests.unit.signature_policy.common import PARAMS, Scene, policy_of, slow_down_digests
from trimsfs.errors import ObjectChangedError, SignatureError, StoreUnavailableError


async def test_a_manifest_that_has_been_replaced_does_not_keep_files_below_it_from_being_opened(scene: Scene) -> None:
    async with scene.serving(metadata_ttl=60.0) as server:
        await server.listing("signed")  # names are known from here on
        scene.sign()
        errors = []
        for _ in range(5):
            try:
                assert await server.content("signed/deep/shard") == scene.files["deep/shard"]
                break
            except ObjectChangedError as error:
                errors.append(error)
        assert len(errors) <= 1, errors  # the kernel comes back once


async def test_a_command_that_is_closed_as_the_store_fails_does_not_end_the_server(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene.serving() as server:
        path = await server.control_file(PARAMS, "warm-disk")
        number = await server.number(path)
        closed = trio.Event()
        handles: list[int] = []

        async def stat(key: str) -> object:
            """Fails at the moment at which the command is closed."""
            await trio.sleep(0.05)
            if not closed.is_set():
                closed.set()
                server.release(handles[0])
            raise StoreUnavailableError("the store is down")

        scene.store.block(method="list_page", key="signed/model.sig/")
        monkeypatch.setattr(scene.store, "stat", stat)
        handles.append(await server.open_inode(number))
        await closed.wait()
        await trio.sleep(0.2)
        scene.store.heal()


async def test_a_file_whose_admission_is_forgotten_while_the_store_is_slow_is_not_taken_for_one_without_signature(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.MOST_ADMITTED", 1)
    async with scene.serving(retry_deadline=20.0) as server:
        assert await server.content(PARAMS) == scene.params
        number = await server.number(PARAMS)
        blob = scene.blob(server)
        assert blob.token in policy_of(server)._admitted
        await server.disk.damage.set_digest(blob, None)  # as when it has been mended with other bytes
        gate = scene.store.block(method="list_page", key="signed/")
        refused = []

        async def open_it() -> None:
            try:
                await server.open_inode(number)
            except Exception as error:
                refused.append(error)

        assert blob.health.digest is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            await reached(gate)
            async with server.disk.blobs.using(scene.store.generation("signed/model.sig")) as other:
                await policy_of(server).admit(other, nullcontext)
            await trio.sleep(1.2)
            gate.set()
        assert refused or blob.health.compared, "opened as if nothing had to be signed"


async def test_what_differs_is_not_fetched_again_for_each_of_those_that_open_it_at_once(scene: Scene) -> None:
    scene.store.put(PARAMS, scene.params[:-1] + b"?")
    async with scene.serving() as server:
        number = await server.number(PARAMS)

        async def open_it() -> None:
            with pytest.raises(SignatureError):
                await server.open_inode(number)

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(open_it)
        assert scene.store.reads(PARAMS).count(0) <= 4  # one alone costs three


async def test_a_program_with_a_timer_comes_to_open_what_has_to_be_compared(scene: Scene) -> None:
    async with scene.serving(signatures="off") as server:
        await server.command("warm-host", "other")
    scene.sign("other")
    async with scene.serving(backing=FakeBacking(), retry_deadline=20.0) as server:
        begun = slow_down_digests(server)
        for _ in range(15):  # the kernel's EINTR: the program opens it again
            signal = Signal()
            async with trio.open_nursery() as nursery:

                async def tick(signal: Signal = signal) -> None:
                    await trio.sleep(0.2)
                    signal.send()

                nursery.start_soon(tick)
                try:
                    await server.open("other/params", interruptible=signal.interruptible)
                except InterruptedError:
                    continue
                nursery.cancel_scope.cancel()
                return
        pytest.fail(f"never opened; compared from the beginning {len(begun)} times")


async def test_want_of_descriptors_for_a_moment_does_not_deny_a_file_for_minutes(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    scene.store.digests["other/params"] = digest_of(scene.params, "md5", certain=False)
    async with scene.serving(signatures="off", digests="wait", cold_open="wait") as server:
        with monkeypatch.context() as context:
            context.setattr(os, "dup", none)
            await server.outcome("pin", "other/params")
        await trio.sleep(1)  # ten times LOOK_INTERVAL_S
        await until(lambda: server.integrity.statistics().doubtful == 0)
        try:
            assert await server.content("other/params") == scene.params
        finally:
            await server.outcome("unpin", "other/params")


async def test_what_is_signed_no_more_is_not_compared_for_ever(scene: Scene) -> None:
    async with scene.serving(scrub_interval=0.5) as server:
        server.release(await server.open(PARAMS))
        scene.sign(params=None)
        scene.store.corrupt(PARAMS, 77)
        scene.damage()
        await until(lambda: server.integrity.statistics().repaired_chunks >= 1)
        server.integrity.scrubber._interval_s = 1e9
        await trio.sleep(2)
        await until(lambda: server.integrity.statistics().to_compare == 0)
