"""Publishing versions in a bucket or a directory: what readers see, and what concurrent publishers cannot do."""

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import trio

from tests.contract.backends import WRITABLE, new_bucket, s3_options, use_only, writable
from tests.services import S3Server
from tests.support.stores import MemoryStore
from tests.versions.proxy import proxy_of
from tests.versions.safetensors_files import file_of
from trimsfs.errors import (
    ConfigurationError,
    InUseError,
    NoSuchEntryError,
    ObjectChangedError,
    TrimsError,
    VersionConflictError,
)
from trimsfs.extras.versions import alias as aliases
from trimsfs.extras.versions import removal
from trimsfs.extras.versions.catalog import Catalog, now
from trimsfs.extras.versions.content import Bytes, Content, LocalFile, files_of_directory, files_of_store
from trimsfs.extras.versions.description import describe
from trimsfs.extras.versions.publishing import Publication, publish
from trimsfs.formats import version_records
from trimsfs.formats.version_records import Alias, Reservation, Tombstone
from trimsfs.options import MountOptions
from trimsfs.stores import writer as protocol
from trimsfs.stores.digests import Digest
from trimsfs.stores.open import open_writer
from trimsfs.stores.retrying import Retrying

PART = 5 << 20
SMALL = {"config.json": b"{}", "sub/tokenizer.json": b"[]", "empty": b""}
LARGE = os.urandom(PART + 100)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PART_SIZE", PART)


@pytest.fixture(params=WRITABLE)
def options(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MountOptions:
    return writable(request, tmp_path, monkeypatch)


@pytest.fixture
async def catalog(options: MountOptions) -> AsyncIterator[Catalog]:
    async with opened(options) as catalog:
        yield catalog


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[Catalog]:
    """A model in a directory, where the kind of the store does not matter."""
    async with opened(MountOptions(store=str(tmp_path))) as catalog:
        yield catalog


@contextlib.asynccontextmanager
async def opened(options: MountOptions, *, conditions: bool = True) -> AsyncIterator[Catalog]:
    writer = open_writer(options, scratch="m/.trims-versions/scratch", max_requests=8, conditions=conditions)
    try:
        yield Catalog(writer, "m")
    finally:
        await writer.aclose()


async def push(
    catalog: Catalog, version: str, files: Mapping[str, bytes | Content], *, conditions: bool = True
) -> Publication:
    contents = {path: Bytes(file) if isinstance(file, bytes) else file for path, file in files.items()}
    described = await describe(contents)
    return await publish(catalog, version, described, conditions=conditions, progress=lambda _: None)


async def files_in(catalog: Catalog, version: str) -> dict[str, bytes]:
    """What the store has below the directory of a version."""
    prefix, found = f"{catalog.name}/{version}/", {}
    async for stored in catalog.writer.list(prefix):
        content = await catalog.writer.read(stored.key)
        assert content is not None
        found[stored.key.removeprefix(prefix)] = content[0]
    return found


async def test_a_version_is_published_as_plain_files(catalog: Catalog) -> None:
    files = {**SMALL, "large.bin": LARGE}
    published = await push(catalog, "v1", files)

    assert (published.sent_files, published.sent_bytes) == (4, sum(map(len, files.values())))
    assert await files_in(catalog, "v1") == files
    manifest = await catalog.published("v1")
    assert manifest == published.manifest
    etags = {stored.key: stored.etag async for stored in catalog.writer.list("m/v1/")}
    for path, file in manifest.files.items():
        assert file.sha256 == hashlib.sha256(files[path]).hexdigest()
        assert file.etag == etags[f"m/v1/{path}"]
    assert {stored.key async for stored in catalog.writer.list("m/.trims-versions/")} == {
        "m/.trims-versions/v1.json",
        "m/.trims-versions/fingerprints/v1.json",
    }


async def test_a_version_that_is_there_is_left_as_it_is(catalog: Catalog) -> None:
    first = await push(catalog, "v1", SMALL)
    again = await push(catalog, "v1", SMALL)
    assert (again.manifest, again.sent_files, again.sent_bytes) == (first.manifest, 0, 0)

    with pytest.raises(VersionConflictError, match="other files"):
        await push(catalog, "v1", SMALL | {"config.json": b"{1}"})
    with pytest.raises(VersionConflictError, match="other files"):
        await push(catalog, "v1", SMALL | {"more": b""})
    assert await files_in(catalog, "v1") == SMALL
    assert not (await catalog.contents()).unfinished


async def test_a_push_tells_which_file_of_a_version_is_damaged_in_the_store(catalog: Catalog) -> None:
    await push(catalog, "v1", SMALL)
    found = await catalog.writer.read("m/v1/config.json")
    assert found is not None
    await catalog.writer.put_if_match("m/v1/config.json", b"[]", found[1])
    remedy = "put it back, or remove the version and push under another name"
    with pytest.raises(
        VersionConflictError, match=f"m:v1: config.json in the store is not what was published: {remedy}"
    ):
        await push(catalog, "v1", SMALL)
    await catalog.writer.delete(["m/v1/config.json"])
    with pytest.raises(VersionConflictError, match=f"m:v1: config.json is missing in the store: {remedy}"):
        await push(catalog, "v1", SMALL)

    content = SMALL["config.json"]
    await catalog.writer.put_if_absent("m/v1/config.json", content, sha256=hashlib.sha256(content).hexdigest())
    assert (await push(catalog, "v1", SMALL)).sent_bytes == 0


class Failing(Bytes):
    """Content that cannot be read any more once its digest is known."""

    async def read(self, offset: int, length: int) -> bytes:
        raise NoSuchEntryError("removed")


class Changing(Bytes):
    """Content that changes after its digest was computed."""

    async def read(self, offset: int, length: int) -> bytes:
        return b"?" + (await super().read(offset, length))[1:]


@contextlib.contextmanager
def before_put(catalog: Catalog, key: str, happens: Callable[[], Awaitable[object]]) -> Iterator[None]:
    """Something happens, once, before the object of a *key*, or below a part of one, is made."""
    put = catalog.writer.put_if_absent

    async def after_it(there: str, data: bytes, *, sha256: str | None = None) -> None:
        if key in there:
            patch.undo()
            await happens()
        await put(there, data, sha256=sha256)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog.writer, "put_if_absent", after_it)
        yield


def group(kind: type[TrimsError], words: str) -> pytest.RaisesGroup[TrimsError]:
    """Expect an error of concurrent tasks."""
    return pytest.RaisesGroup(pytest.RaisesExc(kind, match=words), flatten_subgroups=True)


async def test_nobody_sees_a_version_whose_push_has_not_ended(catalog: Catalog) -> None:
    with group(NoSuchEntryError, "removed"):
        await push(catalog, "v1", SMALL | {"z": Failing(b"z"), "large": LARGE})
    contents = await catalog.contents()
    assert not contents.published
    assert list(contents.unfinished) == ["v1"]
    with pytest.raises(NoSuchEntryError, match="has not ended"):
        await catalog.published("v1")
    with pytest.raises(NoSuchEntryError, match="has not ended"):
        await aliases.move(catalog, "prod", "v1")

    published = await push(catalog, "v1", SMALL | {"z": b"z", "large": LARGE})
    assert published.sent_bytes <= len(LARGE) + sum(map(len, SMALL.values())) + 1
    assert await files_in(catalog, "v1") == SMALL | {"z": b"z", "large": LARGE}
    assert not (await catalog.contents()).unfinished


@pytest.mark.parametrize("content", [b"small", LARGE])
async def test_a_file_that_changes_while_it_is_pushed_is_not_published(catalog: Catalog, content: bytes) -> None:
    with group(ObjectChangedError, "file: it is not what its digest says"):
        await push(catalog, "v1", {"file": Changing(content)})
    assert await files_in(catalog, "v1") == {}
    assert not (await catalog.contents()).published


async def test_a_version_whose_manifest_nobody_could_read_is_not_pushed(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of 40 characters that are not ASCII takes 240 bytes in JSON."""
    monkeypatch.setattr(version_records, "MOST_BYTES", 1 << 16)
    for count, fits in ((100, True), (200, False)):
        files = {"\u6a21" * 40 + str(number): b"" for number in range(count)}
        if fits:
            await push(catalog, "v1", files)
            assert len((await catalog.published("v1")).files) == count
        else:
            with pytest.raises(ConfigurationError, match="manifest of 200 files"):
                await push(catalog, "v2", files)
    assert await files_in(catalog, "v2") == {}
    assert (await catalog.contents()).unfinished == {}


async def test_other_files_do_not_go_on_with_an_unfinished_push(catalog: Catalog) -> None:
    with group(NoSuchEntryError, "removed"):
        await push(catalog, "v1", {"a": b"old", "z": Failing(b"z")})
    with pytest.raises(VersionConflictError, match=r"a push of other files has begun .* rm --unfinished"):
        await push(catalog, "v1", {"a": b"new", "z": b"z"})

    await removal.remove_unfinished(catalog, "v1")
    await push(catalog, "v1", {"a": b"new", "z": b"z"})
    assert await files_in(catalog, "v1") == {"a": b"new", "z": b"z"}
    with pytest.raises(VersionConflictError, match="has ended"):
        await removal.remove_unfinished(catalog, "v1")


@pytest.mark.parametrize("until", ["fingerprints", "files"])
async def test_a_push_that_ends_while_its_remains_are_removed_leaves_no_version_without_files(
    local: Catalog, until: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with group(NoSuchEntryError, "removed"):
        await push(local, "v1", SMALL | {"z": Failing(b"z")})
    before = await files_in(local, "v1")
    delete, deleted = local.writer.delete, 0

    async def ends(keys: Sequence[str]) -> None:
        """The push, which has looked at its reservation before, makes the manifest after so many deletions."""
        nonlocal deleted
        await delete(keys)
        deleted += 1
        if deleted == (1 if until == "fingerprints" else 2):
            files = {"z": version_records.VersionFile(size=1, sha256="0" * 64, etag="z")}
            manifest = version_records.Manifest(version="v1", created=now(), files=files)
            await local.writer.put_if_absent(version_records.manifest_key("m", "v1"), manifest.encode())

    monkeypatch.setattr(local.writer, "delete", ends)
    if until == "fingerprints":
        with pytest.raises(VersionConflictError, match="its push has ended"):
            await removal.remove_unfinished(local, "v1")
        assert await files_in(local, "v1") == before
    else:
        await removal.remove_unfinished(local, "v1")
        assert (await local.manifest("v1"), await files_in(local, "v1")) == (None, {})


async def test_a_push_that_begins_while_remains_are_removed_is_kept(
    local: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with group(NoSuchEntryError, "removed"):
        await push(local, "v1", SMALL | {"z": Failing(b"z")})
    discard = local.writer.discard_uploads

    async def begins(prefix: str) -> None:
        await discard(prefix)
        monkeypatch.setattr(local.writer, "discard_uploads", discard)
        await push(local, "v1", SMALL)

    monkeypatch.setattr(local.writer, "discard_uploads", begins)
    with pytest.raises(VersionConflictError, match="its push has ended"):
        await removal.remove_unfinished(local, "v1")
    assert await files_in(local, "v1") == SMALL
    assert await local.manifest("v1") is not None


async def test_a_first_version_hides_no_directories(catalog: Catalog) -> None:
    """A mount shows no other directories of a model than its versions."""
    for path in ("config.json", ".cache/a", "fp16/a", "fp32/a", "v1/a"):
        await catalog.writer.put_if_absent(f"m/{path}", b"somebody's")
    before = {stored.key async for stored in catalog.writer.list("m/")}
    for version in ("v1", "v2"):
        with pytest.raises(
            VersionConflictError, match=r"/m: it holds directories .*: fp16, fp32, v1: choose another name$"
        ):
            await push(catalog, version, SMALL)
    assert {stored.key async for stored in catalog.writer.list("m/")} == before

    await catalog.writer.delete([f"m/{path}" for path in ("fp16/a", "fp32/a", "v1/a")])
    await push(catalog, "v1", SMALL)
    await push(catalog, "v2", SMALL)
    assert list((await catalog.contents()).published) == ["v1", "v2"]


async def test_a_push_that_begins_meanwhile_has_made_its_directory(
    local: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is listed, but ``.trims-versions``, which it has made before, was not there yet."""
    directories = local.writer.directories

    async def another_began(prefix: str) -> AsyncIterator[str]:
        monkeypatch.setattr(local.writer, "directories", directories)
        await push(local, "v1", SMALL)
        yield "v1"

    monkeypatch.setattr(local.writer, "directories", another_began)
    await push(local, "v2", SMALL)
    assert list((await local.contents()).published) == ["v1", "v2"]


async def test_files_that_no_push_has_written_are_left_alone(catalog: Catalog) -> None:
    await push(catalog, "v0", SMALL)
    await catalog.writer.put_if_absent("m/v1/a", b"somebody's")
    with pytest.raises(VersionConflictError, match="a is there, and not by a push: choose another version"):
        await push(catalog, "v1", SMALL)

    assert await files_in(catalog, "v1") == {"a": b"somebody's"}
    assert (await catalog.contents()).unfinished == {}
    assert await catalog.reservation("v1") is None


async def test_no_model_lies_in_a_version_of_another(local: Catalog, tmp_path: Path) -> None:
    await push(local, "v1", SMALL)
    writer = open_writer(MountOptions(store=str(tmp_path / "m")), scratch="v1/.trims-versions/scratch", max_requests=8)
    try:
        remedy = f"write {tmp_path}/m:v1, or choose another name"
        with pytest.raises(VersionConflictError, match=f"v1 is a version of the model above it: {remedy}"):
            await push(Catalog(writer, "v1"), "w", SMALL)
        with pytest.raises(VersionConflictError, match=f"/m is a model with versions .*: write {tmp_path}/m:v2, or"):
            await push(Catalog(writer, "v2"), "w", SMALL)
    finally:
        await writer.aclose()
    assert await files_in(local, "v1") == SMALL
    assert not (tmp_path / "m/v2").exists()


async def test_a_model_with_versions_is_not_imported_as_one(local: Catalog) -> None:
    store = MemoryStore({"m/v1/a": b"a", "m/.trims-versions/v1.json": b"{}"})
    retrying = Retrying(deadline_s=5, on_failure=None)
    with pytest.raises(ConfigurationError, match="s3://b/m has versions: import one of them: s3://b/m/VERSION"):
        await files_of_store(store, retrying, "s3://b")
    with pytest.raises(NoSuchEntryError, match=r"a version is s3://b/m/v1$"):
        await files_of_store(MemoryStore({}), retrying, "s3://b/m:v1")


async def test_a_file_that_grows_while_it_is_pushed_is_not_published(local: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"half")
    file = LocalFile(path)
    path.write_bytes(b"half and half")
    with group(ObjectChangedError, "changed while it was read"):
        await push(local, "v1", {"file": file})


async def test_a_removed_version_whose_push_died_leaves_nothing(local: Catalog) -> None:
    await push(local, "v1", {"m.bin": LARGE})
    await push(local, "v2", SMALL)
    key = "m/.trims-versions/pushes/v1.json"
    await local.writer.put_if_absent(key, Reservation(version="v1", content="0", started=now()).encode())
    with pytest.raises(VersionConflictError, match="other files"):
        await push(local, "v1", SMALL)
    await removal.remove(local, "v1", timedelta(0))
    assert await removal.expire(local) == ["v1"]
    with pytest.raises(VersionConflictError, match="was removed"):
        await push(local, "v1", SMALL)
    assert await files_in(local, "v1") == {}
    assert (await local.contents()).unfinished == {}


async def test_of_pushes_of_different_files_one_is_published_whole(catalog: Catalog) -> None:
    ended: dict[bytes, object] = {}

    async def one(content: bytes) -> None:
        files = {f"{number}": content for number in range(5)} | {f"only-{content.decode()}": b""}
        try:
            ended[content] = await push(catalog, "v1", files)
        except* VersionConflictError as error:
            ended[content] = error

    async with trio.open_nursery() as nursery:
        for content in (b"one", b"two", b"six"):
            nursery.start_soon(one, content)
    [winner] = [content for content, result in ended.items() if isinstance(result, Publication)]
    expected = {f"{number}": winner for number in range(5)} | {f"only-{winner.decode()}": b""}
    assert await files_in(catalog, "v1") == expected
    assert set((await catalog.published("v1")).files) == set(expected)
    assert not (await catalog.contents()).unfinished


async def test_pushes_of_equal_files_both_succeed(catalog: Catalog) -> None:
    done = []

    async def one() -> None:
        done.append((await push(catalog, "v1", SMALL | {"more": b"x" * 1000})).manifest.files)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
    assert done[0] == done[1] == done[2] == (await catalog.published("v1")).files


async def test_an_alias_moves_and_remembers(catalog: Catalog) -> None:
    for version in ("v1", "v2", "v3"):
        await push(catalog, version, {"file": version.encode()})
    for version in ("v1", "v2", "v2", "v3"):
        await aliases.move(catalog, "prod", version)
    found = await catalog.alias("prod")
    assert found is not None
    assert (found[0].version, found[0].history) == ("v3", ("v2", "v1"))

    assert (await aliases.rollback(catalog, "prod")).version == "v2"
    moved = await aliases.rollback(catalog, "prod")
    assert (moved.version, moved.history) == ("v1", ())
    with pytest.raises(NoSuchEntryError, match="no other version"):
        await aliases.rollback(catalog, "prod")
    with pytest.raises(NoSuchEntryError, match="prod: is an alias of v1: name the version"):
        await catalog.published("prod")
    with pytest.raises(NoSuchEntryError, match="no such version"):
        await aliases.move(catalog, "prod", "v4")
    with pytest.raises(NoSuchEntryError, match="no such alias"):
        await aliases.rollback(catalog, "canary")
    assert {stored.key async for stored in catalog.writer.list("m/.trims-versions/")} == {
        *(f"m/.trims-versions/v{number}.json" for number in (1, 2, 3)),
        "m/.trims-versions/aliases/prod.json",
    }


async def test_of_many_who_move_an_alias_each_hears_what_became_of_it(catalog: Catalog) -> None:
    for number in range(6):
        await push(catalog, f"v{number}", {"file": b""})
    await aliases.move(catalog, "prod", "v0")
    succeeded = []

    async def one(version: str) -> None:
        with contextlib.suppress(VersionConflictError):
            await aliases.move(catalog, "prod", version)
            succeeded.append(version)

    async with trio.open_nursery() as nursery:
        for number in range(1, 6):
            nursery.start_soon(one, f"v{number}")
    found = await catalog.alias("prod")
    assert found is not None
    assert succeeded
    assert {found[0].version, *found[0].history} == {"v0", *succeeded}


@pytest.mark.parametrize("late", ["push", "alias"])
async def test_of_a_version_and_an_alias_of_one_name_at_most_one_is_made(local: Catalog, late: str) -> None:
    """One of the two is made before the other, or between the other's look for it and what the other writes."""
    await push(local, "v1", SMALL)
    make: dict[str, Callable[[], Awaitable[object]]] = {
        "push": lambda: push(local, "x", SMALL),
        "alias": lambda: aliases.move(local, "x", "v1"),
    }
    first = make["alias" if late == "push" else "push"]
    with (
        before_put(local, "/pushes/x.json" if late == "push" else "/aliases/x.json", first),
        pytest.raises(VersionConflictError, match="choose another"),
    ):
        await make[late]()
    with pytest.raises(VersionConflictError, match="an alias has this name" if late == "push" else "is a version"):
        await make[late]()
    contents = await local.contents()
    made = (list(contents.published), list(contents.aliases), list(contents.unfinished))
    assert made == ((["v1"], ["x"], []) if late == "push" else (["v1", "x"], [], []))


async def test_a_removed_version_is_hidden_at_once_and_deleted_later(catalog: Catalog) -> None:
    async def check_gone() -> None:
        with pytest.raises(NoSuchEntryError, match="was removed"):
            await aliases.move(catalog, "prod", "v1")
        with pytest.raises(VersionConflictError, match="was removed"):
            await push(catalog, "v1", SMALL)

    await push(catalog, "v1", SMALL)
    await push(catalog, "v2", {"file": b""})
    tombstone = await removal.remove(catalog, "v1", timedelta(hours=1))
    assert await removal.remove(catalog, "v1", timedelta(0)) == tombstone  # the first one counts

    contents = await catalog.contents()
    assert (list(contents.published), list(contents.removed)) == (["v2"], ["v1"])
    assert await removal.expire(catalog) == []
    assert await files_in(catalog, "v1") == SMALL
    await check_gone()

    key = "m/.trims-versions/removed/v1.json"
    found = await catalog.writer.read(key)
    assert found is not None
    over = Tombstone(version="v1", removed=now(), delete_after=now())
    await catalog.writer.put_if_match(key, over.encode(), found[1])
    assert await removal.expire(catalog) == ["v1"]
    kept = {f"m/{key}" for key in (".trims-versions/v2.json", ".trims-versions/deleted/v1.json", "v2/file")}
    assert {stored.key async for stored in catalog.writer.list("m/")} == kept
    await check_gone()
    with pytest.raises(NoSuchEntryError, match="was removed"):
        await removal.remove(catalog, "v1", timedelta(0))


async def test_the_grace_period_goes_by_the_clock_of_the_store(catalog: Catalog) -> None:
    """By that of the host that removes a version, it is over."""
    await push(catalog, "v1", SMALL)
    time = now() - timedelta(hours=2)
    tombstone = Tombstone(version="v1", removed=time, delete_after=time + timedelta(hours=1))
    await catalog.writer.put_if_absent("m/.trims-versions/removed/v1.json", tombstone.encode())

    assert await removal.expire(catalog) == []

    assert await files_in(catalog, "v1") == SMALL
    age = await catalog.writer.age("m/.trims-versions/removed/v1.json")
    assert age is not None
    assert timedelta(seconds=-2) < age < timedelta(minutes=30)
    assert await catalog.writer.age("m/.trims-versions/removed/v2.json") is None


async def test_a_manifest_of_a_version_that_is_deleted_meanwhile_is_withdrawn(local: Catalog) -> None:
    """Another push had left its reservation, so that this one goes on with it after the version was removed."""
    manifest = version_records.Manifest(version="v1", created=now(), files={})

    async def deleted() -> None:
        await local.writer.put_if_absent("m/.trims-versions/v1.json", manifest.encode())
        await removal.remove(local, "v1", timedelta(0))
        assert await removal.expire(local) == ["v1"]

    with (
        before_put(local, "m/.trims-versions/v1.json", deleted),
        pytest.raises(VersionConflictError, match="was removed"),
    ):
        await push(local, "v1", SMALL)
    assert (await local.contents()).manifests == {}


async def test_a_version_that_an_alias_leads_to_is_not_removed(local: Catalog) -> None:
    await push(local, "v1", SMALL)
    await push(local, "v2", SMALL)
    await aliases.move(local, "prod", "v1")
    with pytest.raises(InUseError, match="alias prod leads to it"):
        await removal.remove(local, "v1", timedelta(0))
    await aliases.move(local, "prod", "v2")
    await removal.remove(local, "v1", timedelta(0))
    assert await removal.expire(local) == ["v1"]
    with pytest.raises(NoSuchEntryError, match="no other version"):
        await aliases.rollback(local, "prod")  # to v1, which is gone


async def test_who_moves_an_alias_and_who_removes_its_target_do_not_both_succeed(
    local: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await push(local, "v1", SMALL)
    await push(local, "v2", SMALL)
    await aliases.move(local, "prod", "v2")
    put = local.writer.put_if_match

    async def removed_before(key: str, data: bytes, etag: str) -> None:
        if Alias.parse(data).version == "v1":
            monkeypatch.setattr(local.writer, "put_if_match", put)
            await removal.remove(local, "v1", timedelta(hours=1))
        await put(key, data, etag)

    monkeypatch.setattr(local, "check_conditions", trio.lowlevel.checkpoint)
    monkeypatch.setattr(local.writer, "put_if_match", removed_before)
    with pytest.raises(VersionConflictError, match="somebody is removing it"):
        await aliases.move(local, "prod", "v1")
    found = await local.alias("prod")
    assert found is not None
    assert found[0].version == "v2"


async def test_an_alias_that_moves_while_its_target_is_removed_keeps_it(local: Catalog) -> None:
    await push(local, "v1", SMALL)
    with (
        before_put(local, "/removed/", lambda: aliases.move(local, "prod", "v1")),
        pytest.raises(InUseError, match="alias prod leads to it"),
    ):
        await removal.remove(local, "v1", timedelta(hours=1))
    assert list((await local.contents()).published) == ["v1"]


@pytest.mark.parametrize("theirs", [False, True])
async def test_a_removal_that_is_not_the_first_looks_at_aliases_too(
    local: Catalog, monkeypatch: pytest.MonkeyPatch, theirs: bool
) -> None:
    """The answer to the first attempt at its tombstone was lost, or the tombstone is of another removal."""
    await push(local, "v1", SMALL)
    put = local.writer.put_if_absent

    async def moved_before(key: str, data: bytes, *, sha256: str | None = None) -> None:
        if "/removed/" not in key:
            return await put(key, data, sha256=sha256)
        await aliases.move(local, "prod", "v1")
        other = Tombstone(version="v1", removed=now(), delete_after=now() - timedelta(days=1))
        await put(key, other.encode() if theirs else data, sha256=sha256)
        raise ObjectChangedError(key)

    monkeypatch.setattr(local.writer, "put_if_absent", moved_before)
    with pytest.raises(InUseError, match="alias prod leads to it"):
        await removal.remove(local, "v1", timedelta(0))
    assert (await local.tombstone("v1") is not None) == theirs
    assert await removal.expire(local) == []
    assert await files_in(local, "v1") == SMALL
    if theirs:
        with pytest.raises(InUseError, match="alias prod leads to it"):
            await removal.remove(local, "v1", timedelta(0))


async def test_a_push_whose_claim_is_removed_publishes_nothing(local: Catalog) -> None:
    class Removing(Bytes):
        async def read(self, offset: int, length: int) -> bytes:
            await removal.remove_unfinished(local, "v1")
            return await super().read(offset, length)

    with pytest.raises(VersionConflictError, match="somebody has removed it"):
        await push(local, "v1", {"file": Removing(b"x")})
    assert not (await local.contents()).published


async def test_an_import_reads_once_what_the_source_tells_the_digest_of(local: Catalog) -> None:
    store = MemoryStore({"large": LARGE, "sub/small": b"{}", ".hidden/a": b"", "sub/.b": b""})
    store.digests["large"] = Digest(algorithm="sha256", value=hashlib.sha256(LARGE).digest())
    files, hidden = await files_of_store(store, Retrying(deadline_s=5, on_failure=None), "memory://")
    assert (set(files), hidden) == ({"large", "sub/small"}, [".hidden/", "sub/.b"])
    await push(local, "v1", files)

    assert await files_in(local, "v1") == {"large": LARGE, "sub/small": b"{}"}
    assert sorted(store.reads("large")) == [0, PART]
    assert store.reads("sub/small") == [0, 0]  # once for its digest


async def test_an_import_leaves_what_a_push_leaves_to_compare_versions(local: Catalog, tmp_path: Path) -> None:
    """Whether the source tells a digest, so that a file is read once, in parts, or not."""
    tensors = {"small": os.urandom(100), "large": os.urandom(2 * PART), "last": os.urandom(PART)}
    files = {**SMALL, "small.safetensors": file_of({"a": b"1"}), "m.safetensors": file_of(tensors), "large": LARGE}
    for path, content in files.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(content)
    await push(local, "pushed", files_of_directory(tmp_path / "model")[0])
    store = MemoryStore(files)
    for path in ("m.safetensors", "large", "small.safetensors"):
        store.digests[path] = Digest(algorithm="sha256", value=hashlib.sha256(files[path]).digest())
    await push(local, "imported", (await files_of_store(store, Retrying(deadline_s=5, on_failure=None), ""))[0])

    found = await local.fingerprints("pushed")
    assert found.keys() == {"small.safetensors", "m.safetensors", "large"}
    assert found["m.safetensors"].tensors.keys() == tensors.keys()
    assert await local.fingerprints("imported") == found


@pytest.mark.parametrize("content", [b"small", LARGE])
async def test_an_import_compares_files_with_the_digests_that_the_source_tells(local: Catalog, content: bytes) -> None:
    store = MemoryStore({"file": content})
    store.digests["file"] = Digest(algorithm="sha256", value=hashlib.sha256(b"other").digest())
    files, _ = await files_of_store(store, Retrying(deadline_s=5, on_failure=None), "memory://")
    with group(ObjectChangedError, "file: it is not what its digest says"):
        await push(local, "v1", files)
    assert not (await local.contents()).published


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
async def test_a_store_that_ignores_conditions_is_refused(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    use_only(moto, monkeypatch)
    with proxy_of(moto) as proxy, contextlib.closing(moto.client()) as client:
        proxy.strip = frozenset({header})
        options = s3_options(proxy.server.endpoint_url, new_bucket(client).bucket)
        async with opened(options) as catalog:
            if header == "if-none-match":
                with pytest.raises(ConfigurationError, match=r"ignores If-None-Match.*--single-writer"):
                    await push(catalog, "v1", SMALL)
                assert {stored.key async for stored in catalog.writer.list("m/")} == set()
        async with opened(options, conditions=False) as catalog:
            await push(catalog, "v1", SMALL, conditions=False)
            assert await files_in(catalog, "v1") == SMALL
            await push(catalog, "v2", SMALL, conditions=False)
        async with opened(options) as catalog:
            if header == "if-match":
                with pytest.raises(ConfigurationError, match=r"ignores If-Match.*--single-writer"):
                    await aliases.move(catalog, "prod", "v1")
                assert (await catalog.contents()).aliases == {}
                alias = Alias(version="v1", history=("v2",), moved=now())
                await catalog.writer.put_if_absent("m/.trims-versions/aliases/prod.json", alias.encode())
                with pytest.raises(ConfigurationError, match=r"ignores If-Match.*--single-writer"):
                    await aliases.rollback(catalog, "prod")
        async with opened(options, conditions=False) as catalog:
            for version in ("v1", "v2"):
                await aliases.move(catalog, "prod", version, conditions=False)
            assert (await aliases.rollback(catalog, "prod", conditions=False)).version == "v1"
