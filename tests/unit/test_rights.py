"""Tenants with credentials of their own at two paths of one store: the store decides what each may open."""

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import pytest
import trio

from tests.support.parts import until
from tests.support.served import MAIN, Server, Serving
from tests.support.stores import MemoryStore
from trimsfs.errors import (
    ConfigurationError,
    ObjectChangedError,
    StoreAccessError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.options import MountOptions, StoreTable, Tenant, places
from trimsfs.stores.base import Store
from trimsfs.stores.open import open_store, routed

OBJECTS = {"both": os.urandom(20_000), "mine": os.urandom(10_000), "empty": b""}
TTL_S = 60.0
Mounted = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture
def store() -> MemoryStore:
    """The store as the first tenant's credentials see it."""
    return MemoryStore(OBJECTS, identity="s3://same")


@pytest.fixture
def other() -> MemoryStore:
    """The same as those of another tenant do: names, but not this content."""
    store = MemoryStore(OBJECTS, identity="s3://same")
    refuse(store, "mine")
    return store


@pytest.fixture
def serving(serving: Serving, other: MemoryStore) -> Mounted:
    """Starts a server for both, whose caches are apart unless they *share*."""

    def serve(*, share: bool = False, **options: object) -> AbstractAsyncContextManager[Server]:
        tenants = [
            Tenant(path=path, role_arn=f"arn:aws:iam::1:role/{path}", share_cache=share) for path in (MAIN, "other")
        ]
        chosen = {"tenants": tuple(tenants), "prefetch": "off", "metadata_ttl": TTL_S, "retry_deadline": 0.3, **options}
        return partial(serving, beside={"other": other})(**chosen)

    return serve


def refuse(store: MemoryStore, key: str) -> None:
    """The store refuses to read an object, as S3 does without s3:GetObject: its name is listed."""
    for method in ("read", "stat"):
        store.fail(StoreAccessError("AccessDenied"), times=float("inf"), method=method, key=key)


async def test_tenants_that_share_have_one_copy(serving: Mounted, store: MemoryStore, other: MemoryStore) -> None:
    async with serving(share=True) as server:
        assert await server.content(f"{MAIN}/both") == OBJECTS["both"]
        before = dict(other.fetched)
        assert await server.content("other/both") == OBJECTS["both"]

        assert other.count("read", "both") == 1, "one byte, which shows the right to read it"
        assert sum(other.fetched.values()) - sum(before.values()) <= 1
        assert len(await server.disk.residencies.all()) == 1
        assert (await server.outcome("pin", "other/both"))[0] == "done"
        assert (await server.info(f"{MAIN}/both"))["pinned"]


async def test_an_open_without_waiting_asks_as_well(serving: Mounted, store: MemoryStore, backing: object) -> None:
    """Of a file that the kernel reads by itself."""
    async with serving(metadata_ttl=2.0, backing=backing) as server:
        await server.content(f"{MAIN}/mine")
        await until(lambda: all(map(server.passthrough.resident, server.disk.blobs)))
        number = await server.number(f"{MAIN}/mine")
        handle = server.open_resident(number)
        assert handle is not None
        server.release(handle)
        refuse(store, "mine")
        await trio.sleep(2.1)

        assert server.open_resident(await server.number(f"{MAIN}/mine")) is None
        with pytest.raises(StoreAccessError):
            await server.content(f"{MAIN}/mine")


async def test_in_an_outage_the_last_grant_counts(serving: Mounted, store: MemoryStore, other: MemoryStore) -> None:
    async with serving(share=True, metadata_ttl=0.3) as server:
        await server.content(f"{MAIN}/both")
        for each in (store, other):
            each.fail(TransientStoreError("503"), times=float("inf"))
        await trio.sleep(0.4)

        assert await server.content(f"{MAIN}/both") == OBJECTS["both"]
        with pytest.raises(StoreUnavailableError):
            await server.content("other/both")


async def test_in_an_outage_a_tenants_own_cache_is_read_by_the_next_server(
    serving: Mounted, store: MemoryStore
) -> None:
    async with serving() as server:
        await server.content(f"{MAIN}/both")
        await server.listing(MAIN)
        await server.components.disk.journal.flush()
        kept = server.namespace._kept
        await until(lambda: kept is not None and kept._waiting == 0)
    store.fail(TransientStoreError("503"), times=float("inf"))

    async with serving() as server:
        assert await server.content(f"{MAIN}/both") == OBJECTS["both"]


async def test_another_content_is_looked_up_anew(serving: Mounted, store: MemoryStore) -> None:
    async with serving() as server:
        number = await server.number(f"{MAIN}/both")
        store.put("both", b"new")

        with pytest.raises(ObjectChangedError):
            await server.open_inode(number)
        assert await server.content(f"{MAIN}/both") == b"new"


async def test_an_empty_file_is_asked_for_too(serving: Mounted, store: MemoryStore) -> None:
    async with serving() as server:
        assert await server.content(f"{MAIN}/empty") == b""
        assert store.count("stat", "empty") >= 1


async def test_a_reader_is_not_failed_by_a_tenant_that_may_not_read(
    serving: Mounted, store: MemoryStore, other: MemoryStore
) -> None:
    """The fetch goes on with the credentials of who has opened the file, of whom it was opened last."""
    async with serving(share=True) as server:
        handle = await server.open(f"{MAIN}/mine")
        with pytest.raises(StoreAccessError):
            await server.content("other/mine")
        generation = (await server.find("other/mine")).inode.generation
        assert generation is not None
        async with server.disk.blobs.using(generation):  # as a prefetch does
            assert await server.read(handle) == OBJECTS["mine"]
        server.release(handle)
        assert other.fetched == {}


async def test_a_reader_is_not_failed_by_a_tenant_that_loses_its_right_after_its_open(
    serving: Mounted, store: MemoryStore, other: MemoryStore
) -> None:
    """Of two that share and have a file open, the fetch goes on with the credentials of the one that may read it."""
    async with serving(share=True) as server:
        handles = [await server.open(f"{path}/both") for path in (MAIN, "other")]
        refuse(other, "both")
        assert await server.read(handles[0]) == OBJECTS["both"]
        assert other.count("read", "both") <= 3, "one that asked for the right, and those that were refused at once"
        for handle in handles:
            server.release(handle)


async def test_readers_hear_that_none_of_the_tenants_that_share_may_read_any_more(
    serving: Mounted, store: MemoryStore, other: MemoryStore
) -> None:
    async with serving(share=True) as server:
        handles = [await server.open(f"{path}/both") for path in (MAIN, "other")]
        for each in (store, other):
            refuse(each, "both")
        for handle in handles:
            with pytest.raises(StoreAccessError):
                await server.read(handle)
            server.release(handle)


def options(*tenants: Tenant, **other: object) -> MountOptions:
    return MountOptions.model_validate({"store": "s3://models", "tenants": tenants, **other})


def test_a_tenants_place_has_the_credentials_of_the_tenant() -> None:
    a = Tenant(path="team/a", role_arn="arn:aws:iam::1:role/a")
    found = {place.path: place for place in places(options(a, profile="operator", anonymous=True))}

    assert list(found) == ["", "team/a/"]
    assert (found[""].options.role_arn, found[""].tenant) == (None, None)
    own = found["team/a/"]
    assert (own.base, own.options.role_arn, own.options.profile, own.options.anonymous) == (
        "",
        "arn:aws:iam::1:role/a",
        "operator",
        False,
    )


def test_a_profile_that_does_not_exist_is_told_with_its_tenant() -> None:
    with pytest.raises(ConfigurationError, match=r"\[\[tenants\]\] path team: S3: The config profile \(none\).*aws"):
        open_store(options(Tenant(path="team", profile="none")), max_requests=4)


def test_a_tenant_above_stores_has_credentials_for_each() -> None:
    stores = tuple(StoreTable(path=path, store="s3://x") for path in ("team/one", "team/two", "other"))
    team = Tenant(path="team", profile="team")

    found = places(options(team, store=None, stores=stores))

    assert {place.path: place.options.profile for place in found} == {
        "team/one/": "team",
        "team/two/": "team",
        "other/": None,
    }


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (options(Tenant(path="a", role_arn="arn:aws:iam::1:role/r"), store="/srv/models"), "takes none"),
        (
            options(
                Tenant(path="a", role_arn="arn:aws:iam::1:role/r"),
                store=None,
                stores=(StoreTable(path="b", store="s3://x"),),
            ),
            "no store",
        ),
    ],
)
def test_credentials_that_are_of_no_use_are_refused(wrong: MountOptions, cause: str) -> None:
    with pytest.raises(ConfigurationError, match=cause):
        places(wrong)


def test_a_tenant_that_shares_has_credentials() -> None:
    with pytest.raises(ValueError, match="share_cache"):
        Tenant(path="a", share_cache=True)
    with pytest.raises(ValueError, match="needs the role"):
        Tenant.model_validate({"path": "a", "profile": "p", "web_identity_token_file": "/token"})
    with pytest.raises(ValueError, match="role_arn: must be an ARN"):
        Tenant(path="a", role_arn="reader")


def test_one_store_at_two_paths_with_other_credentials_takes_tenants(store: MemoryStore, other: MemoryStore) -> None:
    tables = tuple(
        StoreTable(path=path, store="s3://same", profile=profile) for path, profile in (("a", "x"), ("b", "y"))
    )
    found = places(options(store=None, stores=tables))
    stores: dict[str, Store] = {"a/": store, "b/": other}

    with pytest.raises(ConfigurationError, match="write them into"):
        routed(found, stores)


@pytest.mark.parametrize(("signatures", "copies"), [("off", 1), ("check", 2)])
async def test_one_store_at_two_paths_has_one_copy_unless_files_are_signed_by_their_path(
    store: MemoryStore, signatures: str, copies: int
) -> None:
    tables = tuple(StoreTable(path=path, store="s3://same") for path in ("a", "b"))
    signed = {} if signatures == "off" else {"signatures": signatures, "signing_key": "/key.pem"}
    stores: dict[str, Store] = {"a/": store, "b/": store}

    router = routed(places(options(store=None, stores=tables, **signed)), stores)

    found = [await router.stat(f"{path}/both") for path in ("a", "b")]
    assert len({generation.token(router.origins) for generation in found}) == copies
    assert found[1].linked == ("a/both" if copies == 1 else None)
