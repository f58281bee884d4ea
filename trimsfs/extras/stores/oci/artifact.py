"""Artifacts: the layers that a manifest names, and the files that these are or contain.

A layer is one file, named by an annotation, or an archive of files. ModelPack and KitOps say which by the layer's media
type. So do container images, whose layers have no names. Plain artifacts of oras are files, but for directories, which
oras marks, and compresses.
"""

import json
import posixpath
import re
from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimsfs.errors import StoreUnavailableError
from trimsfs.extras.stores.oci.tar_layer import PATH_MAX, Member
from trimsfs.stores.base import Page, moment
from trimsfs.text import printable
from trimsfs.types import Generation

_PATHS = ("org.cncf.model.filepath", "org.cnai.model.filepath", "org.opencontainers.image.title")
"""Annotations that name a layer's file; the second is of drafts of ModelPack."""
_METADATA = "org.cncf.model.file.metadata+json"
_CREATED = "org.opencontainers.image.created"
_UNPACK = "io.deis.oras.content.unpack"
_MODEL_TYPES = ("application/vnd.cncf.model.", "application/vnd.cnai.model.", "application/vnd.kitops.modelkit.")
_DIRECTORY = "application/vnd.oci.image.layer.v1.tar+gzip"
"""The media type by which oras' Python package marks directories, as that of Go does by an annotation, too."""
_EMPTY = "application/vnd.oci.empty.v1+json"
_FORM = re.compile(r"[./](tar|raw)(?:[+.]([a-z0-9]+))?\Z")
"""The end of a media type that says how a layer is packed, and how it is compressed."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_LINKS = 8
"""Links that are followed one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A blob of ``size`` bytes: a tar archive, or the file ``name``."""

    digest: str
    size: int
    tar: bool
    name: str
    modified_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Where the bytes of a file lie: from ``offset`` on in a layer; None is the layer itself."""

    layer: str
    offset: int | None
    size: int
    modified_ns: int

    @property
    def etag(self) -> str:
        """The ETag, which says all that a read needs."""
        return self.layer if self.offset is None else f"{self.layer}@{self.offset}"


Entries = dict[str, Content | None]
"""Files by their paths; None is a directory."""


def place(etag: str) -> tuple[str, int] | None:
    """The layer and the offset that an ETag says; None if it is no ETag of an artifact's file."""
    layer, at, offset = etag.partition("@")
    if not _DIGEST.fullmatch(layer) or bool(at) != offset.isdecimal():
        return None
    return layer, int(offset or 0)


def children(manifest: Mapping[str, Any], subject: str) -> str | None:
    """The digest of the one manifest in an index; None for what is no index. Raises StoreUnavailableError for more."""
    if "manifests" not in manifest:
        return None
    digests = [str(each["digest"]) for each in manifest["manifests"]]
    if len(digests) != 1 or not _DIGEST.fullmatch(digests[0]):
        some = ", ".join([digest for digest in digests if _DIGEST.fullmatch(digest)][:3])
        raise StoreUnavailableError(f"{subject}: an index of {len(digests)} manifests: name one by @DIGEST: {some}")
    return digests[0]


def parsed(content: bytes) -> dict[str, Any]:
    """A manifest or index as JSON. Raises ValueError and TypeError."""
    document = json.loads(content)
    if not isinstance(document, dict):
        raise TypeError("a manifest is an object")
    return document


def layers(manifest: Mapping[str, Any], subject: str) -> list[Layer]:
    """The layers of a manifest, in order.

    Raises StoreUnavailableError for one that is compressed, and ValueError, KeyError or TypeError if it is malformed.
    """
    created = _time((manifest.get("annotations") or {}).get(_CREATED))
    descriptors = [each for each in manifest["layers"] if each["mediaType"] != _EMPTY]
    return [_layer(each, created, subject) for each in descriptors]


def _layer(descriptor: Mapping[str, Any], created: int, subject: str) -> Layer:
    digest, size, kind = str(descriptor["digest"]), int(descriptor["size"]), str(descriptor["mediaType"])
    annotations: Mapping[str, str] = descriptor.get("annotations") or {}
    if not _DIGEST.fullmatch(digest) or size < 0:
        raise ValueError(f"layer {digest[:80]!r} of {size} bytes")
    named = next(filter(None, map(annotations.get, _PATHS)), None)
    directory = kind == _DIRECTORY and named is not None and not named.endswith((".tgz", ".tar.gz"))
    unpack = directory or annotations.get(_UNPACK) == "true"
    form = _FORM.search(kind) if kind.startswith(_MODEL_TYPES) or unpack or named is None else None
    packed, compression = form.groups() if form is not None else ("", None)
    if compression or (unpack and packed != "tar"):
        raise StoreUnavailableError(
            f"{subject}: layer {printable(named or digest)} is compressed ({printable(kind)}), and cannot be read in "
            "part: push it uncompressed: `kit pack --compression none`, files instead of directories with oras, raw "
            "with modctl"
        )
    return Layer(
        digest=digest,
        size=size,
        tar=packed == "tar",
        name=_path(named) if named else digest.replace(":", "-"),
        modified_ns=_mtime(annotations.get(_METADATA)) or created,
    )


def add_file(entries: Entries, layer: Layer) -> None:
    """Add a layer that is a file."""
    _add(entries, layer.name, Content(layer=layer.digest, offset=None, size=layer.size, modified_ns=layer.modified_ns))


def add_members(entries: Entries, layer: Layer, members: Iterable[Member]) -> None:
    """Add the files and directories of a tar layer; of two with one path, the later counts. Links become the files to
    which they lead in the layer or those before it; other links, and special files, do not exist."""
    links: dict[str, str] = {}
    for member in members:
        path = _path(member.path)
        links.pop(path, None)
        match member.kind:
            case "file":
                modified = moment(int(member.mtime) * 1_000_000_000) if member.mtime > 0 else layer.modified_ns
                content = Content(layer=layer.digest, offset=member.offset, size=member.size, modified_ns=modified)
                _add(entries, path, content)
            case "directory":
                _add(entries, path, None)
            case "hard link":
                links[path] = _path(member.target)
            case "symbolic link":
                links[path] = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.target))
    for path, target in links.items():
        for _ in range(_MOST_LINKS):
            target = links.get(target, target)  # noqa: PLW2901
        linked = entries.get(target)
        if linked is not None:
            _add(entries, path, linked)


def _add(entries: Entries, path: str, content: Content | None) -> None:
    if path:
        entries[path] = content


class Artifact:
    """The files of the manifest *digest* below *prefix*. An unchanged file keeps the time that it had *earlier*."""

    def __init__(self, digest: str, entries: Entries, prefix: str, earlier: "Artifact | None") -> None:
        self.digest = digest
        self._files: dict[str, Generation] = {}
        self._directories: dict[str, list[str]] = {} if prefix else {"": []}
        for path in sorted(entries):
            content = entries[path]
            if not path.startswith(prefix) and f"{path}/" != prefix:
                continue
            key = path[len(prefix) :]
            if content is None:
                self._add_directory(f"{key}/" if key else "")
            elif key:
                self._files[key] = self._generation(key, content, earlier)
                self._add_name(key)

    def file(self, key: str) -> Generation | None:
        """The generation of a file; None if there is none."""
        return self._files.get(key)

    def page(self, prefix: str, token: str | None, limit: int) -> Page:
        """As `Store.list_page`."""
        names = self._directories.get(prefix, [])
        start = 0 if token is None else bisect_right(names, token)
        page = names[start : start + limit]
        return Page(
            objects=tuple(self._files[prefix + name] for name in page if not name.endswith("/")),
            prefixes=tuple(prefix + name for name in page if name.endswith("/")),
            next_token=page[-1] if start + limit < len(names) else None,
            empty=not names and prefix in self._directories,
        )

    def _generation(self, key: str, content: Content, earlier: "Artifact | None") -> Generation:
        before = earlier.file(key) if earlier is not None else None
        if before is not None and (before.etag, before.size) == (content.etag, content.size):
            return before
        return Generation(key=key, etag=content.etag, size=content.size, modified_ns=content.modified_ns)

    def _add_directory(self, key: str) -> None:
        if key not in self._directories:
            self._directories[key] = []
            if key:
                self._add_name(key)

    def _add_name(self, key: str) -> None:
        """Enter a file, or a directory, which ends in ``/``, in the directory that it is in, and that likewise."""
        while True:
            parent, name = _split(key)
            known = parent in self._directories
            insort(self._directories.setdefault(parent, []), name)
            if known or not parent:
                return
            key = parent


def _split(key: str) -> tuple[str, str]:
    """The directory that a key is in, and its name there."""
    head, slash, tail = key.rstrip("/").rpartition("/")
    return head + slash, tail + ("/" if key.endswith("/") else "")


def _path(name: str) -> str:
    """A name in an artifact as a key, without the dots and slashes that mean nothing; empty for none."""
    if len(name) > PATH_MAX:
        return ""
    return "/".join(part for part in name.split("/") if part not in {"", "."})


def _mtime(metadata: str | None) -> int:
    try:
        return _time(json.loads(metadata)["mtime"]) if metadata else 0
    except (ValueError, LookupError, TypeError):
        return 0


def _time(text: object) -> int:
    """A time as RFC 3339 in nanoseconds; 0 for none."""
    try:
        return (
            max(0, moment(int(datetime.fromisoformat(text).timestamp()) * 1_000_000_000))
            if isinstance(text, str)
            else 0
        )
    except (ValueError, OverflowError):
        return 0
