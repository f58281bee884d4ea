"""The objects that describe versions: what is written is read back, and nothing malformed is taken for one."""

import json
from datetime import UTC, datetime

import pytest

from trimsfs.formats import version_records
from trimsfs.formats.table import FormatError
from trimsfs.formats.version_records import Alias, Manifest, Tombstone, VersionFile

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
SHA256 = "ab" * 32
MANIFEST = Manifest(
    version="v1",
    created=NOW,
    files={
        "config.json": VersionFile(size=2, sha256=SHA256, etag='"e"'),
        "a/b.bin": VersionFile(size=3, sha256=SHA256, etag=""),
    },
)
ALIAS = Alias(version="v2", history=("v1", "v0"), moved=NOW)
TOMBSTONE = Tombstone(version="v1", removed=NOW, delete_after=NOW)


def changed(value: Manifest | Alias | Tombstone, **fields: object) -> bytes:
    return json.dumps(json.loads(value.encode()) | fields).encode()


def test_what_is_written_is_read_back() -> None:
    assert Manifest.parse(MANIFEST.encode()) == MANIFEST
    assert Alias.parse(ALIAS.encode()) == ALIAS
    assert Tombstone.parse(TOMBSTONE.encode()) == TOMBSTONE
    assert MANIFEST.size == 5


def test_the_objects_have_the_documented_fields() -> None:
    entry = {"size": 2, "sha256": SHA256, "etag": '"e"'}
    manifest = json.loads(MANIFEST.encode())
    assert manifest.pop("files")["config.json"] == entry
    assert manifest == {"format": 1, "version": "v1", "created": "2026-05-04T03:02:01Z", "bytes": 5}
    assert json.loads(ALIAS.encode()) == {
        "format": 1,
        "version": "v2",
        "history": ["v1", "v0"],
        "moved": "2026-05-04T03:02:01Z",
    }
    assert json.loads(TOMBSTONE.encode()) == {
        "format": 1,
        "version": "v1",
        "removed": "2026-05-04T03:02:01Z",
        "delete_after": "2026-05-04T03:02:01Z",
    }


def test_fields_of_a_later_trimsfs_are_ignored_but_not_its_formats() -> None:
    assert Manifest.parse(changed(MANIFEST, more=1)) == MANIFEST
    with pytest.raises(FormatError, match="later trimsfs"):
        Manifest.parse(changed(MANIFEST, format=2))


@pytest.mark.parametrize(
    "fields",
    [
        {"format": True},
        {"version": "../v"},
        {"version": "aliases"},
        {"version": 1},
        {"created": "yesterday"},
        {"created": "2026-05-04T03:02:01"},
        {"bytes": 6},
        {"files": []},
        {"files": {"../x": {"size": 5, "sha256": SHA256, "etag": ""}}},
        {"files": {"/x": {"size": 5, "sha256": SHA256, "etag": ""}}},
        {"files": {"a//x": {"size": 5, "sha256": SHA256, "etag": ""}}},
        {"files": {"\ud800": {"size": 5, "sha256": SHA256, "etag": ""}}},
        {"files": {"x": {"size": -1, "sha256": SHA256, "etag": ""}}, "bytes": -1},
        {"files": {"x": {"size": True, "sha256": SHA256, "etag": ""}}, "bytes": 1},
        {"files": {"x": {"size": 5, "sha256": SHA256.upper(), "etag": ""}}},
        {"files": {"x": {"size": 5, "sha256": SHA256}}},
        {"files": {"x": 5}},
    ],
)
def test_a_malformed_manifest_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        Manifest.parse(changed(MANIFEST, **fields))


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_what_is_no_such_object_is_refused(data: bytes) -> None:
    for kind in (Manifest, Alias, Tombstone):
        with pytest.raises(FormatError):
            kind.parse(data)


def test_an_alias_or_tombstone_with_invalid_fields_is_refused() -> None:
    for fields in ({"history": ["v"] * 21}, {"history": [1]}, {"history": ["/"]}, {"moved": 1}, {"version": "removed"}):
        with pytest.raises(FormatError):
            Alias.parse(changed(ALIAS, **fields))
    with pytest.raises(FormatError):
        Tombstone.parse(changed(TOMBSTONE, delete_after=None))


def test_names_in_the_directories_of_versions_and_aliases() -> None:
    names = ["v1.json", "v1.sigstore.json", "aliases", "aliases.json", ".x.json", "v1", "1.0.json"]
    assert [version_records.version_of_manifest(name) for name in names] == ["v1", None, None, None, None, None, "1.0"]
    assert version_records.alias_of("prod.json") == "prod"
    assert version_records.manifest_key("org/m", "v1") == "org/m/.trims-versions/v1.json"
    assert version_records.alias_key("m", "prod") == "m/.trims-versions/aliases/prod.json"
    assert version_records.tombstone_key("m", "v1") == "m/.trims-versions/removed/v1.json"
