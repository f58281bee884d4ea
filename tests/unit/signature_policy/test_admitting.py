"""Where files must be what has been signed, nobody gets anything else of them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, until
from tests.support.served import FakeBacking, Serving
from tests.support.signing import new_key, sign
from tests.support.stores import MemoryStore
from tests.unit.signature_policy.common import KEY
from trimsfs.errors import BlobDamagedError, CacheFullError, SignatureError, StoreUnavailableError


@pytest.mark.parametrize("cold_open", ["auto", "wait", "stream"])
async def test_what_has_been_signed_is_read(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], cold_open: str
) -> None:
    for _ in range(2):
        async with serving(cold_open=cold_open, backing=FakeBacking()) as server:
            for name, content in files.items():
                assert await server.content(f"signed/{name}") == content
            assert (await server.attribute("signed/params", "digest") or "").startswith("sha256:")
            assert await server.content("signed/model.sig")
    assert store.count("digest", "signed/params") == 0
    assert sum(length for (key, _), length in store.fetched.items() if key == "signed/params") == len(files["params"])


@pytest.mark.parametrize("required", [True, False])
async def test_what_has_not_been_signed_is_read_only_where_that_is_not_required(
    serving: Serving, files: dict[str, bytes], required: bool
) -> None:
    async with serving(signatures="require" if required else "check") as server:
        for name, content in files.items():
            if required:
                with pytest.raises(SignatureError, match=f"other/{name}: no model.sig in any directory above it"):
                    await server.open(f"other/{name}")
            else:
                assert await server.content(f"other/{name}") == content


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("name", ["params", "deep/shard", "empty"])
async def test_what_differs_from_what_has_been_signed_is_refused(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], name: str, required: bool
) -> None:
    store.put(f"signed/{name}", files[name][:-1] + b"?")
    async with serving(signatures="require" if required else "check") as server:
        for _ in range(3):
            with pytest.raises(SignatureError, match=f"signed/{name}: digest differs from the signed one"):
                await server.open(f"signed/{name}")
        assert store.reads(f"signed/{name}").count(0) <= 3  # not again for each open
        await until(lambda: server.integrity.statistics().doubtful == 0)
        store.put(f"signed/{name}", files[name])
        assert await server.content(f"signed/{name}") == files[name]


async def test_a_file_that_has_been_added_is_refused(serving: Serving, store: MemoryStore) -> None:
    store.put("signed/more", b"something else")
    async with serving(signatures="check") as server:
        with pytest.raises(SignatureError, match=r"signed/more: not in /signed/model.sig: sign the model again"):
            await server.open("signed/more")


async def test_what_others_have_signed_is_refused(
    serving: Serving, store: MemoryStore, files: dict[str, bytes]
) -> None:
    store.put("other/model.sig", sign(new_key(), files))
    store.put("signed/deep/model.sig", b"no signature")
    async with serving(signatures="check") as server:
        with pytest.raises(SignatureError, match=r"other/model.sig: not signed with the signing_key"):
            await server.open("other/params")
        with pytest.raises(SignatureError, match=r"signed/deep/model.sig: not a model signature"):
            await server.open("signed/deep/shard")


async def test_a_manifest_above_counts(serving: Serving, store: MemoryStore, files: dict[str, bytes]) -> None:
    store.put("model.sig", sign(KEY, {f"other/{name}": content for name, content in files.items()}))
    async with serving() as server:
        for name, content in files.items():
            assert await server.content(f"other/{name}") == content
            assert await server.content(f"signed/{name}") == content


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin"])
async def test_commands_do_not_bring_what_nobody_could_open(serving: Serving, command: str) -> None:
    async with serving() as server:
        assert await server.outcome(command, "signed") == ("done", None)
        assert await server.outcome(command, "other") == ("failed", "SignatureError")
        assert not (await server.disk.residency(server.store.generation("other/params"))).pinned


async def test_nothing_of_the_content_is_told_either(serving: Serving) -> None:
    async with serving() as server:
        with pytest.raises(SignatureError):
            await server.content("other/.trims/params/tensors")
        with pytest.raises(SignatureError):
            await server.attribute("other/params", "tensors")
        assert await server.attribute("other/params", "etag")
        assert json.loads(await server.content("signed/.trims/params/tensors"))["format"] is None


async def test_what_has_been_fetched_unsigned_is_checked_when_it_is_opened(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    async with serving(signatures="off", backing=FakeBacking()) as server:
        await server.command("warm-host", "other")
        assert await server.attribute("other/params", "verified") == "true"
    store.put("other/model.sig", sign(KEY, files | {"params": b"another content"}))
    async with serving(backing=FakeBacking()) as server:
        with pytest.raises(SignatureError):
            await server.open("other/params")
        assert await server.content("other/deep/shard") == files["deep/shard"]
    assert len(blob_files(tmp_path / "cache")) >= 2


async def test_a_store_that_is_away_is_no_missing_signature(serving: Serving, store: MemoryStore) -> None:
    async with serving(signatures="check") as server:
        number = await server.number("other/params")
        store.fail(StoreUnavailableError("the store is down"), method="list_page", times=float("inf"))
        store.fail(StoreUnavailableError("the store is down"), method="stat", times=float("inf"))
        with pytest.raises(StoreUnavailableError):
            await server.open_inode(number)


async def test_what_does_not_fit_cannot_be_checked(
    serving: Serving, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.opening.cold_open.PATIENCE_S", 0.1)
    async with serving(cache_size=2 * chunk_size) as server:
        with pytest.raises(CacheFullError):
            await server.open("signed/params")


async def test_what_was_signed_and_is_here_does_not_wait_for_the_store(
    serving: Serving, store: MemoryStore, files: dict[str, bytes]
) -> None:
    async with serving(signatures="check", retry_deadline=20.0) as server:
        names = [f"{model}/{name}" for model in ("signed", "other") for name in files]
        for name in names:
            await server.content(name)
        store.fail(StoreUnavailableError("the store is down"), times=float("inf"))
        for name in names:
            with trio.fail_after(5):
                assert await server.content(name) == files[name.partition("/")[2]]


async def test_damage_is_not_told_as_a_wrong_signature(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.corrupt("signed/params", 5)
    async with serving() as server:

        async def away(_blob: object) -> int:
            raise StoreUnavailableError("the store is down")

        with monkeypatch.context() as context:
            context.setattr(server.integrity.repair, "refetch", away)
            with pytest.raises(BlobDamagedError, match="signed/params: digest mismatch"):
                await server.open("signed/params")
        await until(lambda: server.integrity.statistics().doubtful == 0)
        assert await server.content("signed/params") == files["params"]


async def test_what_is_lost_at_a_boot_is_compared_again(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot, left = tmp_path / "boot", tmp_path / "left"
    boot.write_text("one")
    monkeypatch.setattr("trimsfs.tiers.index.index.BOOT_ID", boot)
    async with serving() as server:
        assert await server.content("signed/params") == files["params"]
        await server.disk.flush()
        shutil.copytree(tmp_path / "cache", left)  # before all has been brought to the disk
    boot.write_text("two")
    store.contents["signed/params", store.generation("signed/params").etag] = files["params"][:-1] + b"?"
    shutil.rmtree(tmp_path / "cache")
    left.rename(tmp_path / "cache")
    async with serving(backing=FakeBacking()) as server:
        with pytest.raises(SignatureError):
            await server.open("signed/params")


async def test_what_is_cut_off_is_compared_again(
    serving: Serving, store: MemoryStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    async with serving(backing=None) as server:
        await server.open("signed/params")
        (file,) = [file for file in blob_files(tmp_path / "cache") if file.stat().st_size == len(files["params"])]
        os.truncate(file, 100)
        store.contents["signed/params", store.generation("signed/params").etag] = files["params"][:-1] + b"?"
        with pytest.raises(SignatureError):
            await server.open("signed/params")


async def test_a_manifest_that_is_none_is_read_once(serving: Serving, store: MemoryStore) -> None:
    store.put("other/model.sig", b"[" * 100_000)
    async with serving() as server:
        for _ in range(3):
            with pytest.raises(SignatureError, match=r"other/model.sig: not a model signature"):
                await server.open("other/params")
        assert len(server.filesystem._trust.signature_policy.manifests._kept) == 1  # type: ignore[union-attr]
