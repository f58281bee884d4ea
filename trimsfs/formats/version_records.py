"""The JSON objects that describe versions of a model in a store: manifests, aliases and tombstones.

``NAME/VERSION/FILE`` is a file of a version; what describes it lies in ``NAME/.trims-versions/``. No I/O here.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from trimsfs.formats.table import FormatError

T = TypeVar("T")

FORMAT = 1
DIRECTORY = ".trims-versions"
"""The directory of a model that holds what describes its versions; a mount does not show it."""
ALIASES = "aliases"
REMOVED = "removed"
DELETED = "deleted"
PUSHES = "pushes"
FINGERPRINTS = "fingerprints"
HISTORY = 20
"""Most earlier targets that an alias remembers."""
MOST_BYTES = 16 << 20
"""Bytes of the longest object that is parsed: enough for some 80,000 files."""
PATH_MAX = 1024
"""Bytes of the longest path of a file."""
_SIGNATURE = ".sigstore"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFile:
    """One file of a version: bytes, SHA-256 in hexadecimal digits, and its ETag as the store told it."""

    size: int
    sha256: str
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a version consists of: files by path below its directory. A version without it does not exist."""

    version: str
    created: datetime
    files: Mapping[str, VersionFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def encode(self) -> bytes:
        """The object in the store."""
        files = {
            path: {"size": file.size, "sha256": file.sha256, "etag": file.etag}
            for path, file in sorted(self.files.items())
        }
        return encoded(
            {"version": self.version, "created": text(self.created), "files": files, "bytes": self.size},
        )

    @classmethod
    def parse(cls, data: bytes) -> "Manifest":
        """Raises FormatError."""
        fields = fields_of(data)
        files = {check_path(path): _file(entry) for path, entry in get(fields, "files", dict).items()}
        manifest = cls(version=_version(fields), created=_time(fields, "created"), files=files)
        if get(fields, "bytes", int) != manifest.size:
            raise FormatError("its files' sizes do not add up to its 'bytes'")
        return manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A name that leads to a version, and the versions that it led to before, newest first."""

    version: str
    history: tuple[str, ...]
    moved: datetime

    def encode(self) -> bytes:
        """The object in the store."""
        return encoded({"version": self.version, "history": list(self.history), "moved": text(self.moved)})

    @classmethod
    def parse(cls, data: bytes) -> "Alias":
        """Raises FormatError."""
        fields = fields_of(data)
        history = get(fields, "history", list)
        if len(history) > HISTORY:
            raise FormatError(f"its 'history' has more than {HISTORY} versions")
        return cls(
            version=_version(fields),
            history=tuple(check_version(version) for version in history),
            moved=_time(fields, "moved"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """Says that a version is removed: not seen any more, deleted after *delete_after*."""

    version: str
    removed: datetime
    delete_after: datetime

    def encode(self) -> bytes:
        """The object in the store."""
        times = {"removed": text(self.removed), "delete_after": text(self.delete_after)}
        return encoded({"version": self.version, **times})

    @classmethod
    def parse(cls, data: bytes) -> "Tombstone":
        """Raises FormatError."""
        fields = fields_of(data)
        return cls(
            version=_version(fields), removed=_time(fields, "removed"), delete_after=_time(fields, "delete_after")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Says that a push of a version is under way, or has died: *content* is a digest of all that it publishes.

    Only a push of the same content goes on with it, so that no version ever has files of two.
    """

    version: str
    content: str
    started: datetime

    def encode(self) -> bytes:
        """The object in the store."""
        return encoded({"version": self.version, "content": self.content, "started": text(self.started)})

    @classmethod
    def parse(cls, data: bytes) -> "Reservation":
        """Raises FormatError."""
        fields = fields_of(data)
        return cls(version=_version(fields), content=get(fields, "content", str), started=_time(fields, "started"))


def check_version(name: object) -> str:
    """A name that a version may have. Raises FormatError."""
    if check_alias(name) in (ALIASES, REMOVED):
        raise FormatError(f"a version may not be named {name!r}")
    if str(name).endswith(_SIGNATURE):
        raise FormatError(f"{name!r}: the name of a version may not end so")
    return str(name)


def check_alias(name: object) -> str:
    """A name that an alias may have. Raises FormatError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FormatError(f"{name!r} is no name: at most 128 of A-Z a-z 0-9 . _ -, the first a letter or digit")
    return name


def manifest_key(model: str, version: str) -> str:
    """The key of a version's manifest; *model* is the key of the model's directory, without ``/`` at its end."""
    return f"{model}/{DIRECTORY}/{version}.json"


def signature_key(model: str, version: str) -> str:
    """The key of the signature beside a version's manifest."""
    return f"{model}/{DIRECTORY}/{version}{_SIGNATURE}.json"


def fingerprints_key(model: str, version: str) -> str:
    """The key of the fingerprints of a version's files."""
    return f"{model}/{DIRECTORY}/{FINGERPRINTS}/{version}.json"


def alias_key(model: str, alias: str) -> str:
    """The key of an alias."""
    return f"{model}/{DIRECTORY}/{ALIASES}/{alias}.json"


def tombstone_key(model: str, version: str) -> str:
    """The key of a version's tombstone."""
    return f"{model}/{DIRECTORY}/{REMOVED}/{version}.json"


def deleted_key(model: str, version: str) -> str:
    """The key of the tombstone of a version whose files are deleted: its name is never free again."""
    return f"{model}/{DIRECTORY}/{DELETED}/{version}.json"


def reservation_key(model: str, version: str) -> str:
    """The key of the reservation of a version's push."""
    return f"{model}/{DIRECTORY}/{PUSHES}/{version}.json"


def version_of_manifest(name: str) -> str | None:
    """The version whose manifest has this file name; None if it is no manifest."""
    return _stem(name, check_version)


def alias_of(name: str) -> str | None:
    """The alias whose object has this file name; None if it is none."""
    return _stem(name, check_alias)


def _stem(name: str, check: Callable[[object], str]) -> str | None:
    stem = name.removesuffix(".json")
    if stem == name or stem.endswith(_SIGNATURE):
        return None
    try:
        return check(stem)
    except FormatError:
        return None


def encoded(fields: Mapping[str, object], *, indent: int | None = 1) -> bytes:
    """An object of this format."""
    return json.dumps({"format": FORMAT, **fields}, indent=indent).encode() + b"\n"


def fields_of(data: bytes) -> dict[str, Any]:
    """The object's fields; those that a later trimsfs adds are ignored. Raises FormatError."""
    if len(data) > MOST_BYTES:
        raise FormatError(f"longer than {MOST_BYTES >> 20} MiB")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise FormatError("not JSON") from None
    if not isinstance(fields, dict):
        raise FormatError("not a JSON object")
    if get(fields, "format", int) != FORMAT:
        raise FormatError(f"of format {fields['format']}, not {FORMAT}: a later trimsfs wrote it")
    return fields


def get(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A field that must be there. Raises FormatError."""
    value = fields.get(name)
    if type(value) is not kind:  # bool is an int
        raise FormatError(f"its {name!r} is {'missing' if value is None else 'not of type ' + kind.__name__}")
    return value


def _version(fields: Mapping[str, Any]) -> str:
    return check_version(get(fields, "version", str))


def check_path(path: str) -> str:
    """A path that a file of a version may have, below the version's directory. Raises FormatError."""
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts) or len(_bytes(path)) > PATH_MAX:
        raise FormatError(f"{path!r} is no path of a file")
    return path


def _bytes(path: str) -> bytes:
    try:
        return path.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{path!r} is not valid UTF-8") from None


def _file(entry: object) -> VersionFile:
    if not isinstance(entry, dict):
        raise FormatError("an entry of its 'files' is not a JSON object")
    size, sha256 = get(entry, "size", int), get(entry, "sha256", str)
    if size < 0 or not _SHA256.fullmatch(sha256):
        raise FormatError("an entry of its 'files' has an invalid size or SHA-256")
    return VersionFile(size=size, sha256=sha256, etag=get(entry, "etag", str))


def _time(fields: Mapping[str, Any], name: str) -> datetime:
    try:
        time = datetime.fromisoformat(get(fields, name, str))
    except ValueError:
        raise FormatError(f"its {name!r} is not a time of ISO 8601") from None
    if time.tzinfo is None:
        raise FormatError(f"its {name!r} has no time zone")
    return time


def text(time: datetime) -> str:
    """A time as the objects have it: ISO 8601 in UTC, in whole seconds."""
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
