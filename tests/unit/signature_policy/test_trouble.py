"""Signed files that are damaged, lost, closed or signed anew just as they are looked at."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_of, flip_byte, until
from tests.support.served import FakeBacking, Serving, Signal
from tests.support.signing import sign
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of
from tests.unit.signature_policy.common import KEY, cached, opened_and_lost
from trimsfs.errors import ObjectChangedError, SignatureError, StoreUnavailableError, TrimsError


async def test_what_replaces_a_damaged_chunk_of_a_recorded_copy_is_not_read_unchecked(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The index has the digest, the disk is damaged, the store gives (under the same ETag) what nobody has signed."""
    async with serving(backing=FakeBacking()) as server:
        assert await server.content("signed/params") == files["params"]
    file = cached(tmp_path, files["params"])
    flip_byte(file, 5)
    evil = b"evil" + files["params"][4:]
    store.contents["signed/params", store.generation("signed/params").etag] = evil
    async with serving(backing=FakeBacking()) as server:
        try:
            found = await server.content("signed/params")
        except SignatureError:
            return
        assert found == files["params"], "a program has read what nobody has signed"


async def test_a_manifest_that_has_been_replaced_does_not_keep_files_below_it_from_being_opened(
    serving: Serving, store: MemoryStore, files: dict[str, bytes]
) -> None:
    async with serving(metadata_ttl=60.0, backing=FakeBacking()) as server:
        await server.listing("signed")  # names are known from here on
        store.put("signed/model.sig", sign(KEY, files) + b"\n")
        errors = []
        for _ in range(5):
            try:
                handle = await server.open("signed/deep/shard")
            except ObjectChangedError as error:
                errors.append(error)
            else:
                assert await server.read(handle) == files["deep/shard"]
                break
        assert len(errors) <= 1, errors  # the kernel comes back once


@pytest.mark.parametrize("name", ["params", "deep/shard"])
async def test_what_was_signed_and_is_here_does_not_wait_for_the_store_in_cached_mode(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], name: str
) -> None:
    async with serving(retry_deadline=20.0, backing=None) as server:
        assert await server.content(f"signed/{name}") == files[name]
        store.fail(StoreUnavailableError("the store is down"), times=float("inf"))
        with trio.fail_after(5):
            assert await server.content(f"signed/{name}") == files[name]


async def test_a_command_that_is_closed_as_the_store_fails_does_not_end_the_server(
    serving: Serving, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(backing=FakeBacking()) as server:
        path = await server.control_file("signed/params", "warm-disk")
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

        store.block(method="list_page", key="signed/model.sig/")
        monkeypatch.setattr(store, "stat", stat)
        handles.append(await server.open_inode(number))
        await closed.wait()
        await trio.sleep(0.2)
        store.heal()


async def test_what_is_lost_of_an_open_file_is_not_read_unchecked(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], chunk_size: int
) -> None:
    """fdatasync fails under an open file (cached mode); what is fetched in its stead nobody has signed."""
    async with serving(backing=None) as server:
        handle, _ = await opened_and_lost(server)
        store.contents["signed/params", store.generation("signed/params").etag] = b"evil" + files["params"][4:]
        await trio.sleep(1.1)  # room is looked for again
        try:
            found = await server.read(handle, 0, chunk_size)
        except SignatureError:
            return
        assert found == files["params"][:chunk_size], "a program has read what nobody has signed"


async def test_a_file_whose_admission_is_forgotten_while_the_store_is_slow_is_not_taken_for_one_without_signature(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.MOST_ADMITTED", 1)
    async with serving(backing=FakeBacking(), retry_deadline=20.0) as server:
        assert await server.content("signed/params") == files["params"]
        number = await server.number("signed/params")
        blob = blob_of(server.disk, store, "signed/params")
        signature_policy = server.filesystem._trust.signature_policy
        assert signature_policy is not None
        assert blob.token in signature_policy._admitted
        await server.integrity._disk.damage.set_digest(blob, None)  # as when it has been mended with other bytes
        gate = store.block(method="list_page", key="signed/")
        refused = []

        async def open_it() -> None:
            try:
                await server.open_inode(number)
            except Exception as error:
                refused.append(error)

        before = blob.health.digest
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            await until(lambda: gate.statistics().tasks_waiting > 0)
            async with server.disk.using(store.generation("signed/model.sig")) as other:
                await signature_policy.admit(other, nullcontext)
            await trio.sleep(1.2)
            gate.set()
        assert before is None
        assert refused or blob.health.compared, "opened as if nothing had to be signed"


async def test_what_differs_is_not_fetched_again_for_each_of_those_that_open_it_at_once(
    serving: Serving, store: MemoryStore, files: dict[str, bytes]
) -> None:
    store.put("signed/params", files["params"][:-1] + b"?")
    async with serving(backing=FakeBacking()) as server:
        number = await server.number("signed/params")

        async def open_it() -> None:
            with pytest.raises(SignatureError):
                await server.open_inode(number)

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(open_it)
        assert store.reads("signed/params").count(0) <= 4  # one alone costs three


async def test_a_program_with_a_timer_comes_to_open_what_has_to_be_compared(
    serving: Serving, store: MemoryStore, files: dict[str, bytes]
) -> None:
    async with serving(signatures="off", backing=FakeBacking()) as server:
        await server.command("warm-host", "other")
    store.put("other/model.sig", sign(KEY, files))
    async with serving(backing=FakeBacking(), retry_deadline=20.0) as server:
        real, begun = server.integrity.comparer._copier.digest, []

        async def slow(*arguments: object) -> object:
            begun.append(True)
            await trio.sleep(0.3)  # a large file
            return await real(*arguments)  # type: ignore[arg-type]

        server.integrity.comparer._copier.digest = slow  # type: ignore[method-assign, assignment]
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
                else:
                    nursery.cancel_scope.cancel()
                    return
        pytest.fail(f"never opened; compared from the beginning {len(begun)} times")


async def test_want_of_descriptors_for_a_moment_does_not_deny_a_file_for_minutes(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.digests["other/params"] = digest_of(files["params"], "md5", certain=False)
    async with serving(signatures="off", backing=FakeBacking(), digests="wait", cold_open="wait") as server:

        def none(*_: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as context:
            context.setattr(os, "dup", none)
            await server.outcome("pin", "other/params")
        await trio.sleep(1)  # ten times LOOK_INTERVAL_S
        await until(lambda: server.integrity.statistics().doubtful == 0)
        try:
            found = await server.content("other/params")
        except TrimsError as error:
            pytest.fail(f"denied still: {error!r}")
        finally:
            await server.outcome("unpin", "other/params")
        assert found == files["params"]


async def test_what_is_signed_no_more_is_not_compared_for_ever(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)
    async with serving(backing=FakeBacking(), scrub_interval=0.5) as server:
        server.release(await server.open("signed/params"))
        store.put("signed/model.sig", sign(KEY, {name: data for name, data in files.items() if name != "params"}))
        file = cached(tmp_path, files["params"])
        store.corrupt("signed/params", 77)
        flip_byte(file, 5)
        await until(lambda: server.integrity.statistics().repaired_chunks >= 1)
        server.integrity.scrubber._interval_s = 1e9
        await trio.sleep(2)
        await until(lambda: server.integrity.statistics().to_compare == 0)
