"""What a store knows of a model's versions: reads and writes manifests, aliases, tombstones and reservations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import trio

from trimsfs.errors import ConfigurationError, NoSuchEntryError, ObjectChangedError, VersionConflictError
from trimsfs.formats import fingerprints, version_records
from trimsfs.formats.fingerprints import Fingerprint
from trimsfs.formats.table import FormatError
from trimsfs.formats.version_records import Alias, Manifest, Reservation, Tombstone
from trimsfs.stores.writer import Writer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All that there is of a model, by the names of versions and aliases. *removed* versions have tombstones."""

    manifests: Mapping[str, Manifest]
    aliases: Mapping[str, Alias]
    removed: Mapping[str, Tombstone]
    unfinished: Mapping[str, Reservation]

    @property
    def published(self) -> Mapping[str, Manifest]:
        """The versions that readers see."""
        return {version: manifest for version, manifest in self.manifests.items() if version not in self.removed}


class Catalog:
    """The objects in ``NAME/.trims-versions/`` of a model. *aws* is how the AWS command line reaches the store."""

    def __init__(self, writer: Writer, name: str, *, aws: str = "aws") -> None:
        self.writer = writer
        self.name = name
        self.aws = aws

    def of(self, version: str) -> str:
        """A version, for messages."""
        return f"{self.writer.location}/{self.name}:{version}"

    async def manifest(self, version: str) -> Manifest | None:
        """The manifest of a version, removed or not; None if nobody has published it."""
        stored = await self._read(version_records.manifest_key(self.name, version), Manifest.parse)
        return stored and stored[0]

    async def alias(self, alias: str) -> tuple[Alias, str] | None:
        """An alias and the ETag of its object."""
        return await self._read(version_records.alias_key(self.name, alias), Alias.parse)

    async def tombstone(self, version: str) -> Tombstone | None:
        """The tombstone of a version whose files are not deleted yet."""
        stored = await self._read(version_records.tombstone_key(self.name, version), Tombstone.parse)
        return stored and stored[0]

    async def removed(self, version: str) -> Tombstone | None:
        """The tombstone of a version, also of one whose files are deleted."""
        tombstone = await self.tombstone(version)
        if tombstone is not None:
            return tombstone
        # In this order: the one is made before the other is deleted.
        stored = await self._read(version_records.deleted_key(self.name, version), Tombstone.parse)
        return stored and stored[0]

    async def reservation(self, version: str) -> Reservation | None:
        """The reservation of an unfinished push."""
        stored = await self._read(version_records.reservation_key(self.name, version), Reservation.parse)
        return stored and stored[0]

    async def fingerprints(self, version: str) -> dict[str, Fingerprint]:
        """The fingerprints of a version's files by path; none if its push has left none."""
        key = version_records.fingerprints_key(self.name, version)
        stored = await self._read(key, fingerprints.parse)
        return stored[0] if stored else {}

    async def led_to(self, name: str) -> str:
        """The version that an alias leads to; any other name is that of a version."""
        current = await self.alias(name)
        return current[0].version if current is not None else name

    async def published(self, version: str) -> Manifest:
        """The manifest of a version that readers see. Raises NoSuchEntryError."""
        manifest, tombstone = await self.manifest(version), await self.removed(version)
        if tombstone is not None:
            raise NoSuchEntryError(f"{self.of(version)}: it was removed at {version_records.text(tombstone.removed)}")
        if manifest is None:
            reason = "no such version: see `trimsfs versions`"
            if await self.reservation(version) is not None:
                reason = "its push has not ended: push again, or, if it is dead, `trimsfs rm --unfinished`"
            elif (alias := await self.alias(version)) is not None:
                reason = f"is an alias of {alias[0].version}: name the version"
            raise NoSuchEntryError(f"{self.of(version)}: {reason}")
        return manifest

    async def has_versions(self) -> bool:
        """Whether anybody has published a version, or begun to."""
        return bool([stored async for stored in self.writer.list(f"{self.name}/{version_records.DIRECTORY}/")])

    async def model_above(self) -> str | None:
        """What the directory of a model that has versions says against another model in it; None if it has none."""
        # Not by reading, as a publisher may have no right to read outside of the model's directory.
        above = [stored.key async for stored in self.writer.list(f"{version_records.DIRECTORY}/")]
        if not above:
            return None
        version = f"write {self.writer.location}:{self.name}"
        if f"{version_records.DIRECTORY}/{self.name}.json" in above:
            return f"{self.name} is a version of the model above it: {version}, or choose another name"
        return f"{self.writer.location} is a model with versions and shows nothing else: {version}, or another store"

    async def contents(self, below: str = "") -> Contents:
        """All objects of the model, or only those in a directory, such as ``aliases/``."""
        directory = f"{self.name}/{version_records.DIRECTORY}/"
        manifests: dict[str, Manifest] = {}
        aliases: dict[str, Alias] = {}
        removed: dict[str, Tombstone] = {}
        unfinished: dict[str, Reservation] = {}

        async def read(into: dict[str, T], key: str, name: str, parse: Callable[[bytes], T]) -> None:
            record = await self._read(key, parse)
            if record is not None:  # else it was deleted meanwhile
                into[name] = record[0]

        async with trio.open_nursery() as nursery:
            async for stored in self.writer.list(directory + below):
                match stored.key.removeprefix(directory).split("/"):
                    case [file] if version := version_records.version_of_manifest(file):
                        nursery.start_soon(read, manifests, stored.key, version, Manifest.parse)
                    case [version_records.ALIASES, file] if alias := version_records.alias_of(file):
                        nursery.start_soon(read, aliases, stored.key, alias, Alias.parse)
                    case [version_records.REMOVED, file] if version := version_records.version_of_manifest(file):
                        nursery.start_soon(read, removed, stored.key, version, Tombstone.parse)
                    case [version_records.PUSHES, file] if version := version_records.version_of_manifest(file):
                        nursery.start_soon(read, unfinished, stored.key, version, Reservation.parse)
        return Contents(
            manifests=dict(sorted(manifests.items())),
            aliases=dict(sorted(aliases.items())),
            removed=dict(sorted(removed.items())),
            unfinished={version: one for version, one in sorted(unfinished.items()) if version not in manifests},
        )

    async def check_conditions(self) -> None:
        """Check that the store heeds If-Match. Raises ConfigurationError."""
        key = f"{self.name}/{version_records.DIRECTORY}/conditions"
        try:
            await self.writer.put_if_match(key, b"", '"00000000000000000000000000000000"')
        except ObjectChangedError:
            return  # there is no such object, so a store that heeds it refuses
        await self.writer.delete([key])
        raise self.without_conditions("If-Match")

    def without_conditions(self, header: str) -> ConfigurationError:
        """The error for a store that does what it is asked though the condition does not hold."""
        return ConfigurationError(
            f"{self.writer.location}: the store ignores {header}: two publishers could mix their files: "
            "install a later one, or set --single-writer while nobody else publishes this model"
        )

    async def _read(self, key: str, parse: Callable[[bytes], T]) -> tuple[T, str] | None:
        stored = await self.writer.read(key)
        if stored is None:
            return None
        try:
            return parse(stored[0]), stored[1]
        except FormatError as error:
            raise VersionConflictError(
                f"{self.writer.location}/{key}: {error}: see who can write to the store"
            ) from None


def now() -> datetime:
    """The time, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)
