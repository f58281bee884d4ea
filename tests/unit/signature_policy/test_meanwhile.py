"""What changes of signed files while something else is being done about them."""

import contextlib
import os

import pytest
import trio

from tests.support.held import unless_refused
from tests.support.parts import flip_byte
from tests.support.served import FakeBacking
from tests.unit.integrity.common import digest_of
from tests.unit.signature_policy.common import PARAMS, Scene
from trimsfs.errors import BlobDamagedError, SignatureError, TrimsError
from trimsfs.extras.gpu.interface import _GPU
from trimsfs.fuse import _libfuse
from trimsfs.stores.digests import compute
from trimsfs.types import Generation


async def test_a_bit_of_a_manifest_that_flips_on_the_way_does_not_deny_a_model_for_ever(scene: Scene) -> None:
    manifest = scene.store.contents["signed/model.sig", scene.store.generation("signed/model.sig").etag]
    scene.store.digests["signed/model.sig"] = digest_of(manifest, "md5", certain=False)
    scene.store.corrupt("signed/model.sig", len(manifest) // 2)
    async with scene.serving(backing=FakeBacking()) as server:
        for _ in range(10):
            with contextlib.suppress(SignatureError):
                assert await server.content(PARAMS) == scene.params
                return
            await trio.sleep(0.1)
        raise AssertionError("still denied")


async def test_an_open_file_goes_on_though_its_manifest_now_tells_of_another(scene: Scene) -> None:
    """A release is uploaded: first the manifest, then the file."""
    async with scene.serving(backing=None) as server:
        handle = await server.open(PARAMS)
        assert await server.read(handle, 0, 10**6) == scene.params
        scene.sign(params=scene.params[::-1])
        with pytest.raises(SignatureError):
            await server.open(PARAMS)
        assert await server.read(handle, 0, scene.chunk_size) == scene.chunk


async def test_local_damage_before_it_is_compared_does_not_deny_a_signed_file(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[bool] = []

    def computed(*arguments: object) -> bytes | None:
        if not done:
            done.append(True)
            flip_byte(scene.cached, 5)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.compute", computed)
    async with scene.serving(backing=None) as server:
        handle = await server.open(PARAMS)
        assert await server.read(handle, 0, 10**6) == scene.params


async def test_a_copy_for_a_gpu_is_not_made_of_what_nobody_has_signed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene.serving(backing=None) as server:
        handle, _ = await scene.opened_and_lost(server)
        scene.give(b"evil" + scene.params[4:])
        await trio.sleep(1.1)
        copies = server.gpu
        loaded = []

        async def lease(generation: Generation, *_: object) -> None:
            """Fills a copy as its loader does."""
            async with server.disk.blobs.using(generation) as one:
                data = await copies._loader.source(one).bytes_of(0, 4)
                loaded.append(bytes(data) if data is not None else os.pread(one.fileno(), 4, 0))
            raise BlobDamagedError("enough")

        monkeypatch.setattr(copies, "lease", lease)
        with pytest.raises(TrimsError):
            await server.filesystem.ioctls.answer(
                _libfuse.IOC_GPU, handle, 1000, 1, _GPU.pack(b"GPU-1", 0, 0, 0, 0, b"", b"", b"")
            )
        assert loaded in ([], [scene.params[:4]]), loaded


async def test_what_replaces_a_damaged_chunk_of_a_recorded_copy_is_not_read_unchecked(scene: Scene) -> None:
    """The index has the digest, the disk is damaged, the store gives (under the same ETag) what nobody has signed."""
    async with scene.serving(backing=FakeBacking()) as server:
        assert await server.content(PARAMS) == scene.params
    scene.damage()
    scene.give(b"evil" + scene.params[4:])
    async with scene.serving(backing=FakeBacking()) as server:
        assert await unless_refused(server.content(PARAMS), SignatureError) in {None, scene.params}
