"""Where files must be what has been signed, nobody gets anything else of them."""

import json
import os
import shutil

import pytest
import trio

from tests.support.parts import blob_files, until
from tests.support.served import FakeBacking
from tests.support.signing import new_key, sign
from tests.unit.signature_policy.common import KEY, PARAMS, Scene, policy_of
from trimsfs.errors import BlobDamagedError, CacheFullError, SignatureError, StoreUnavailableError

either = pytest.mark.parametrize("signatures", ["require", "check"])


@pytest.mark.parametrize("cold_open", ["auto", "wait", "stream"])
async def test_what_has_been_signed_is_read(scene: Scene, cold_open: str) -> None:
    for _ in range(2):
        async with scene.serving(cold_open=cold_open, backing=FakeBacking()) as server:
            for name, content in scene.files.items():
                assert await server.content(f"signed/{name}") == content
            assert (await server.attribute(PARAMS, "digest") or "").startswith("sha256:")
            assert await server.content("signed/model.sig")
    assert scene.store.count("digest", PARAMS) == 0
    assert sum(length for (key, _), length in scene.store.fetched.items() if key == PARAMS) == len(scene.params)


@either
async def test_what_has_not_been_signed_is_read_only_where_that_is_not_required(scene: Scene, signatures: str) -> None:
    async with scene.serving(signatures=signatures) as server:
        for name, content in scene.files.items():
            if signatures == "require":
                with pytest.raises(SignatureError, match=f"other/{name}: no model.sig in any directory above it"):
                    await server.open(f"other/{name}")
            else:
                assert await server.content(f"other/{name}") == content


@either
@pytest.mark.parametrize("name", ["params", "deep/shard", "empty"])
async def test_what_differs_from_what_has_been_signed_is_refused(scene: Scene, name: str, signatures: str) -> None:
    path, content = f"signed/{name}", scene.files[name]
    scene.store.put(path, content[:-1] + b"?")
    async with scene.serving(signatures=signatures) as server:
        for _ in range(3):
            with pytest.raises(SignatureError, match=f"{path}: digest differs from the signed one"):
                await server.open(path)
        assert scene.store.reads(path).count(0) <= 3  # not again for each open
        await until(lambda: server.integrity.statistics().doubtful == 0)
        scene.store.put(path, content)
        assert await server.content(path) == content


async def test_what_no_valid_manifest_tells_is_refused(scene: Scene) -> None:
    scene.store.put("signed/more", b"something else")
    scene.store.put("other/model.sig", sign(new_key(), scene.files))
    scene.store.put("signed/deep/model.sig", b"no signature")
    async with scene.serving(signatures="check") as server:
        for path, message in {
            "signed/more": r"signed/more: not in /signed/model.sig: sign the model again",
            "other/params": r"other/model.sig: not signed with the signing_key",
            "signed/deep/shard": r"signed/deep/model.sig: not a model signature",
        }.items():
            with pytest.raises(SignatureError, match=message):
                await server.open(path)


async def test_a_manifest_above_counts(scene: Scene) -> None:
    scene.store.put("model.sig", sign(KEY, {f"other/{name}": content for name, content in scene.files.items()}))
    async with scene.serving() as server:
        for name, content in scene.files.items():
            assert await server.content(f"other/{name}") == content
            assert await server.content(f"signed/{name}") == content


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin"])
async def test_commands_do_not_bring_what_nobody_could_open(scene: Scene, command: str) -> None:
    async with scene.serving() as server:
        assert await server.outcome(command, "signed") == ("done", None)
        assert await server.outcome(command, "other") == ("failed", "SignatureError")
        assert not (await server.disk.residencies.of(server.store.generation("other/params"))).pinned


async def test_nothing_of_the_content_is_told_either(scene: Scene) -> None:
    async with scene.serving() as server:
        with pytest.raises(SignatureError):
            await server.content("other/.trims/params/tensors")
        with pytest.raises(SignatureError):
            await server.attribute("other/params", "tensors")
        assert await server.attribute("other/params", "etag")
        assert json.loads(await server.content("signed/.trims/params/tensors"))["format"] is None


async def test_what_has_been_fetched_unsigned_is_checked_when_it_is_opened(scene: Scene) -> None:
    async with scene.serving(signatures="off", backing=FakeBacking()) as server:
        await server.command("warm-host", "other")
        assert await server.attribute("other/params", "verified") == "true"
    scene.sign("other", params=b"another content")
    async with scene.serving(backing=FakeBacking()) as server:
        with pytest.raises(SignatureError):
            await server.open("other/params")
        assert await server.content("other/deep/shard") == scene.files["deep/shard"]
    assert len(blob_files(scene.cache)) >= 2


async def test_a_store_that_is_away_is_no_missing_signature(scene: Scene) -> None:
    async with scene.serving(signatures="check") as server:
        number = await server.number("other/params")
        for method in ("list_page", "stat"):
            scene.store.fail(StoreUnavailableError("the store is down"), method=method, times=float("inf"))
        with pytest.raises(StoreUnavailableError):
            await server.open_inode(number)


async def test_what_does_not_fit_cannot_be_checked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.opening.cold_open.PATIENCE_S", 0.1)
    async with scene.serving(cache_size=2 * scene.chunk_size) as server:
        with pytest.raises(CacheFullError):
            await server.open(PARAMS)


@pytest.mark.parametrize("passthrough", [True, False])
async def test_what_was_signed_and_is_here_does_not_wait_for_the_store(scene: Scene, passthrough: bool) -> None:
    backing = FakeBacking() if passthrough else None
    async with scene.serving(signatures="check", retry_deadline=20.0, backing=backing) as server:
        names = [f"{model}/{name}" for model in ("signed", "other") for name in scene.files]
        for name in names:
            await server.content(name)
        scene.away()
        for name in names:
            with trio.fail_after(5):
                assert await server.content(name) == scene.files[name.partition("/")[2]]


async def test_damage_is_not_told_as_a_wrong_signature(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(_blob: object) -> int:
        raise StoreUnavailableError("the store is down")

    scene.store.corrupt(PARAMS, 5)
    async with scene.serving() as server:
        with monkeypatch.context() as context:
            context.setattr(server.integrity.repair, "refetch", away)
            with pytest.raises(BlobDamagedError, match="signed/params: digest mismatch"):
                await server.open(PARAMS)
        await until(lambda: server.integrity.statistics().doubtful == 0)
        assert await server.content(PARAMS) == scene.params


async def test_what_is_lost_at_a_boot_is_compared_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    boot, left = scene.cache.with_name("boot"), scene.cache.with_name("left")
    boot.write_text("one")
    monkeypatch.setattr("trimsfs.tiers.index.index.BOOT_ID", boot)
    async with scene.serving() as server:
        assert await server.content(PARAMS) == scene.params
        await server.disk.journal.flush()
        shutil.copytree(scene.cache, left)  # before all has been brought to the disk
    boot.write_text("two")
    scene.give(scene.params[:-1] + b"?")
    shutil.rmtree(scene.cache)
    left.rename(scene.cache)
    async with scene.serving(backing=FakeBacking()) as server:
        with pytest.raises(SignatureError):
            await server.open(PARAMS)


async def test_what_is_cut_off_is_compared_again(scene: Scene) -> None:
    async with scene.serving(backing=None) as server:
        await server.open(PARAMS)
        os.truncate(scene.cached, 100)
        scene.give(scene.params[:-1] + b"?")
        with pytest.raises(SignatureError):
            await server.open(PARAMS)


async def test_a_manifest_that_is_none_is_read_once(scene: Scene) -> None:
    scene.store.put("other/model.sig", b"[" * 100_000)
    async with scene.serving() as server:
        for _ in range(3):
            with pytest.raises(SignatureError, match=r"other/model.sig: not a model signature"):
                await server.open("other/params")
        assert len(policy_of(server).manifests._kept) == 1
