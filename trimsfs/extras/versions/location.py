"""Where a model's versions are: ``STORE/NAME``, and ``STORE/NAME:VERSION`` for one of them."""

import re
from dataclasses import dataclass

from trimsfs.errors import ConfigurationError
from trimsfs.formats.table import FormatError
from trimsfs.formats.version_records import DIRECTORY, check_version

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A model: its key ``name`` in the store of this URL, and maybe one version."""

    store: str
    name: str
    version: str | None = None

    @property
    def scratch(self) -> str:
        """The key below which a directory store has files that are not complete."""
        return f"{self.name}/{DIRECTORY}/scratch"

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.store.rstrip('/')}/{self.name}{':' + self.version if self.version else ''}"


def parse(text: str) -> Location:
    """A location as a user writes it. Raises ConfigurationError."""
    wanted = f"{text}: write s3://BUCKET/NAME[:VERSION] or DIRECTORY/NAME[:VERSION]"
    scheme = _SCHEME.match(text)
    store, _, last = text[scheme.end() if scheme else 0 :].rstrip("/").rpartition("/")
    name, _, version = last.partition(":")
    if not name or name in {".", ".."} or name.startswith(".trims") or (scheme and not store):
        raise ConfigurationError(wanted)
    root = text.startswith("/") and not store
    store = f"{scheme[0]}{store}" if scheme else "/" if root else store or "."
    if last.endswith(":"):
        raise ConfigurationError(wanted)
    try:
        return Location(store=store, name=name, version=check_version(version) if version else None)
    except FormatError as error:
        raise ConfigurationError(f"{text}: {error}") from None


def parse_new(text: str) -> Location:
    """The location of a model or version to make. Raises ConfigurationError, also if it is the name alone.

    That is more often a store that was forgotten than a model in this directory.
    """
    location = parse(text)
    if "/" not in text.rstrip("/"):
        raise ConfigurationError(
            f"{text}: no store: write s3://BUCKET/{text} or DIRECTORY/{text}, or ./{text} for this directory"
        )
    return location


def parse_version(text: str) -> Location:
    """The location of one version. Raises ConfigurationError."""
    location = parse(text)
    if location.version is None:
        raise ConfigurationError(f"{text}: no version: write {text}:VERSION")
    return location


def parse_model(text: str) -> Location:
    """The location of a model. Raises ConfigurationError."""
    location = parse(text)
    if location.version is not None:
        raise ConfigurationError(f"{text}: write it without the version")
    return location
