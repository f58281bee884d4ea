"""Versions over every kind of store: published, aliased, moved and removed as plain objects."""

import hashlib

from tests.contract.backends import Backend
from tests.support.versions import move, publish, remove, write_files
from trimsfs.formats.version_records import DIRECTORY
from trimsfs.stores.base import Store
from trimsfs.stores.digests import Digest
from trimsfs.stores.layouts.versioned import VersionedStore
from trimsfs.types import Symlink

FILES = {"config.json": b"{}", "deep/weights": b"w" * 1000}


async def test_versions_and_aliases_are_shown_as_they_are_published(backend: Backend, store: Store) -> None:
    def put(key: str, content: bytes) -> str:
        backend.put(key, content)
        return ""

    shown = VersionedStore(store)
    put(f"m/{DIRECTORY}/pushes/v1.json", b"{}")
    write_files(put, "m", "v1", FILES)
    assert not (await shown.list_page("m/v1/", limit=1)).exists
    assert (await shown.list_page("m/")).prefixes == ()

    for version in ("v1", "v2"):
        publish(put, "m", version, FILES)
    move(put, "m", "prod", "v1")
    page = await shown.list_page("m/")
    assert (sorted(page.prefixes), page.objects) == (["m/v1/", "m/v2/"], ())
    assert page.symlinks == (Symlink(key="m/prod", target="v1"),)
    assert (await shown.list_page("m/v2/", limit=1)).exists

    move(put, "m", "prod", "v2")
    assert (await shown.list_page("m/prod/", limit=1)).symlink == Symlink(key="m/prod", target="v2")
    for path, content in FILES.items():
        digest = await shown.digest(await shown.stat(f"m/v2/{path}"))
        assert digest == Digest(algorithm="sha256", value=hashlib.sha256(content).digest())

    remove(put, "m", "v1")
    assert (await shown.list_page("m/")).prefixes == ("m/v2/",)
    assert not (await shown.list_page("m/v1/", limit=1)).exists
