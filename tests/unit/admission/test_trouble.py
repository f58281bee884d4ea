"""Signed files that are damaged, lost, closed or signed anew just as they are looked at."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import trio

from tests.fakes import MemoryStore
from tests.signing import sign
from tests.unit.admission.common import KEY
from tests.unit.parts import blob_files, flip_byte, until
from tests.unit.served import FakeBacking, Serving, Signal
from trimsfs.errors import ObjectChangedError, SignatureError, StoreUnavailableError


async def test_what_replaces_a_damaged_chunk_of_a_recorded_copy_is_not_read_unchecked(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The index has the digest, the disk is damaged, the store gives (under the same ETag) what nobody has signed."""
    async with serving(backing=FakeBacking()) as server:
        assert await server.content("signed/params") == files["params"]
    (file,) = [file for file in blob_files(tmp_path / "cache") if file.stat().st_size == len(files["params"])]
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
    async with serving(ttl_s=60.0, backing=FakeBacking()) as server:
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


async def test_a_signal_ends_an_open_that_compares(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    async with serving(read_manifest=None, backing=FakeBacking()) as server:
        await server.command("warm-host", "other")
    store.put("other/model.sig", sign(KEY, files | {"params": b"another content"}))
    async with serving(backing=FakeBacking(), deadline_s=20.0) as server:
        number = await server.number("other/params")
        signal, ended = Signal(), trio.Event()
        await server.content("other/deep/shard")
        gate = store.block(method="read", key="other/params")

        async def open_it() -> None:
            with pytest.raises(InterruptedError):
                await server.open_inode(number, interruptible=signal.interruptible)
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            await until(lambda: gate.statistics().tasks_waiting == 1)  # it is being fetched again, to be compared
            signal.send()
            with trio.move_on_after(1) as scope:
                await ended.wait()
            gate.set()
            if scope.cancelled_caught:
                nursery.cancel_scope.cancel()
        assert ended.is_set(), "the signal was not heard"


@pytest.mark.parametrize("name", ["params", "deep/shard"])
async def test_what_was_signed_and_is_here_does_not_wait_for_the_store_in_cached_mode(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], name: str
) -> None:
    async with serving(deadline_s=20.0, backing=None) as server:
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
    serving: Serving, store: MemoryStore, files: dict[str, bytes], chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fdatasync fails under an open file (cached mode); what is fetched in its stead nobody has signed."""
    async with serving(backing=None) as server:
        handle = await server.open("signed/params")
        blob = server.disk.known(store.generation("signed/params").token(store.identity))
        assert blob is not None

        def fail() -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as context:
            context.setattr(blob, "sync", fail)
            await server.disk.flush()
            await server.disk._journal.sync()
        assert not blob.complete
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
    monkeypatch.setattr("trimsfs.admission.MOST_ADMITTED", 1)
    async with serving(backing=FakeBacking(), deadline_s=20.0) as server:
        assert await server.content("signed/params") == files["params"]
        number = await server.number("signed/params")
        blob = server.disk.known(store.generation("signed/params").token(store.identity))
        admission = server.filesystem._admission
        assert blob is not None
        assert admission is not None
        assert blob.token in admission._admitted
        await server.integrity._disk.damage.set_digest(blob, None)  # as when it has been mended with other bytes
        gate = store.block(method="list_page", key="signed/")
        refused = []

        async def open_it() -> None:
            try:
                await server.open_inode(number)
            except Exception as error:
                refused.append(error)

        before = blob.digest
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            await until(lambda: gate.statistics().tasks_waiting > 0)
            async with server.disk.using(store.generation("signed/model.sig")) as other:
                await admission.admit(other, nullcontext)
            await trio.sleep(1.2)
            gate.set()
        assert before is None
        assert refused or blob.digest is not None, "opened as if nothing had to be signed"


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
