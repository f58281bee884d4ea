"""Open files that lose bytes, or go on under the next server: what comes is compared, what is here goes on."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import trio

from tests.support.held import begin, unless_refused
from tests.support.parts import fail_to_sync, until
from tests.support.served import Serving
from tests.unit.signature_policy.common import PARAMS, Scene, slow_down_digests
from trimsfs.errors import BlobDamagedError, SignatureError
from trimsfs.handover.ledger import Ledger


@pytest.fixture
def serving(serving: Serving) -> Serving:
    return partial(serving, backing=None)


def release_anew(scene: Scene, version_id: str | None = None) -> None:
    """Upload another release of the model, signed anew."""
    scene.store.put(PARAMS, scene.params[::-1], version_id=version_id)
    scene.sign(params=scene.params[::-1])


@pytest.mark.parametrize(
    ("path", "happens"),
    [(PARAMS, Scene.away), ("other/params", Scene.away), (PARAMS, release_anew)],
    ids=["signed, no store", "unsigned, no store", "another release"],
)
async def test_an_open_file_that_is_here_goes_on_under_the_next_server(
    scene: Scene, path: str, happens: Callable[[Scene], None], ledger: Callable[[], Ledger]
) -> None:
    serving = partial(scene.serving, signatures="require" if path == PARAMS else "check")
    async with serving(ledger=ledger()) as server:
        handle = await server.open(path)
        assert await server.read(handle, 0, 10**6) == scene.params
        await server.disk.journal.flush()
    happens(scene)
    async with serving(ledger=ledger()) as server:
        assert bytes(await server.filesystem.files.read(handle, 0, 10**6)) == scene.params


async def test_what_is_lost_of_an_open_file_is_read_again(scene: Scene) -> None:
    async with scene.serving() as server:
        handle, _ = await scene.opened_and_lost(server)
        assert await server.read(handle, 0, scene.chunk_size) == scene.chunk


async def test_what_is_lost_of_an_open_file_is_not_read_unchecked(scene: Scene) -> None:
    """fdatasync fails under an open file; what is fetched in its stead nobody has signed."""
    async with scene.serving() as server:
        handle, blob = await scene.opened_and_lost(server)
        scene.give(b"evil" + scene.params[4:])
        await trio.sleep(1.1)  # room is looked for again
        slow_down_digests(server)
        async with trio.open_nursery() as nursery:
            first = begin(nursery, unless_refused, server.read(handle, 0, scene.chunk_size), SignatureError)
            await until(lambda: blob.complete)
            # A second reader does not get what is being compared for the first.
            second = begin(nursery, unless_refused, server.read(handle, 0, scene.chunk_size))
        assert {*first, *second} <= {None, scene.chunk}, "a program has read what nobody has signed"


async def test_a_read_does_not_wait_for_the_kernel_that_waits_for_the_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.signature_policy.COMPARED_WITHIN_S", 0.5)
    async with scene.serving() as server:
        handle, blob = await scene.opened_and_lost(server)
        await trio.sleep(1.1)  # room is looked for again
        answered = trio.Event()

        async def forget_pages(_generation: object) -> None:
            await answered.wait()  # the page is locked until the read of it has been answered

        monkeypatch.setattr(server.gpu, "compare", forget_pages)
        scene.store.corrupt(PARAMS, 77)  # one bit flips on the way
        with trio.fail_after(10), suppress(BlobDamagedError):  # unless another comparison has come to its end
            await server.read(handle, 0, scene.chunk_size)
        answered.set()
        await until(lambda: blob.health.compared)
        assert await server.read(handle, 0, scene.chunk_size) == scene.chunk


async def test_an_open_file_goes_on_with_its_version_though_another_has_been_signed(scene: Scene) -> None:
    scene.store.put(PARAMS, scene.params, version_id="v1")
    async with scene.serving() as server:
        handle = await server.open(PARAMS)
        assert await server.read(handle, 0, 10**6) == scene.params
        await fail_to_sync(server.disk, scene.blob(server))
        await trio.sleep(1.1)  # room is looked for again
        release_anew(scene, "v2")
        assert await server.read(handle, 0, scene.chunk_size) == scene.chunk
