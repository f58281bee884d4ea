"""What changes of signed files while something else is being done about them."""

import contextlib
import os
from pathlib import Path

import pytest
import trio

from tests.support.parts import flip_byte
from tests.support.served import FakeBacking, Serving
from tests.support.signing import sign
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of
from tests.unit.signature_policy.common import KEY, cached, opened_and_lost
from trimsfs.errors import BlobDamagedError, SignatureError, TrimsError
from trimsfs.extras.gpu.interface import _GPU
from trimsfs.fuse import _libfuse
from trimsfs.stores.digests import compute
from trimsfs.types import Generation


async def test_a_bit_of_a_manifest_that_flips_on_the_way_does_not_deny_a_model_for_ever(
    serving: Serving, store: MemoryStore, files: dict[str, bytes]
) -> None:
    manifest = store.contents["signed/model.sig", store.generation("signed/model.sig").etag]
    store.digests["signed/model.sig"] = digest_of(manifest, "md5", certain=False)
    store.corrupt("signed/model.sig", len(manifest) // 2)
    async with serving(backing=FakeBacking()) as server:
        for _ in range(10):
            with contextlib.suppress(SignatureError):
                assert await server.content("signed/params") == files["params"]
                return
            await trio.sleep(0.1)
        raise AssertionError("still denied")


async def test_a_read_of_an_open_file_right_after_a_failed_sync(
    serving: Serving, files: dict[str, bytes], chunk_size: int
) -> None:
    async with serving(backing=None) as server:
        handle, _ = await opened_and_lost(server)
        assert await server.read(handle, 0, chunk_size) == files["params"][:chunk_size]


async def test_an_open_file_goes_on_though_its_manifest_now_tells_of_another(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], chunk_size: int
) -> None:
    """A release is uploaded: first the manifest, then the file."""
    async with serving(backing=None) as server:
        handle = await server.open("signed/params")
        assert await server.read(handle, 0, 10**6) == files["params"]
        new = files | {"params": files["params"][::-1]}
        store.put("signed/model.sig", sign(KEY, new))
        with pytest.raises(SignatureError):
            await server.open("signed/params")
        assert await server.read(handle, 0, chunk_size) == files["params"][:chunk_size]


async def test_local_damage_before_it_is_compared_does_not_deny_a_signed_file(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[bool] = []

    def computed(*arguments: object) -> bytes | None:
        if not done:
            done.append(True)
            flip_byte(cached(tmp_path, files["params"]), 5)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.compute", computed)
    async with serving(backing=None) as server:
        handle = await server.open("signed/params")
        assert await server.read(handle, 0, 10**6) == files["params"]


async def test_a_copy_for_a_gpu_is_not_made_of_what_nobody_has_signed(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(backing=None) as server:
        handle, _ = await opened_and_lost(server)
        store.contents["signed/params", store.generation("signed/params").etag] = b"evil" + files["params"][4:]
        await trio.sleep(1.1)
        copies = server.gpu
        loaded = []

        async def lease(generation: Generation, *_: object) -> None:
            """Fills a copy as its loader does."""
            async with server.disk.using(generation) as one:
                data = await copies._loader.source(one).bytes_of(0, 4)
                loaded.append(bytes(data) if data is not None else os.pread(one.fileno(), 4, 0))
            raise BlobDamagedError("enough")

        monkeypatch.setattr(copies, "lease", lease)
        with pytest.raises(TrimsError):
            await server.filesystem.ioctls.answer(
                _libfuse.IOC_GPU, handle, 1000, 1, _GPU.pack(b"GPU-1", 0, 0, 0, 0, b"", b"", b"")
            )
        assert loaded in ([], [files["params"][:4]]), loaded
