"""Removes versions: a tombstone hides one at once, and its files are deleted after a grace period."""

import shlex
from contextlib import suppress
from datetime import timedelta

from trimsfs.errors import InUseError, NoSuchEntryError, ObjectChangedError, VersionConflictError
from trimsfs.extras.versions.catalog import Catalog, now
from trimsfs.formats import version_records
from trimsfs.formats.version_records import Tombstone


async def remove(catalog: Catalog, version: str, grace: timedelta) -> Tombstone:
    """Hide a version, to be deleted after *grace*; a version that is removed already keeps its tombstone.

    Raises InUseError when an alias leads to it, NoSuchEntryError when there is none.
    """
    tombstone, own = await catalog.tombstone(version), None
    if tombstone is None:
        await _check_no_alias(catalog, version)
        await catalog.published(version)
        await _check_aliases(catalog, version)
        time = now()
        tombstone = own = Tombstone(version=version, removed=time, delete_after=time + grace)
        try:
            await catalog.writer.put_if_absent(version_records.tombstone_key(catalog.name, version), own.encode())
        except ObjectChangedError:  # by another removal, or an attempt of which the answer was lost
            tombstone = await catalog.tombstone(version) or own
    try:
        await _check_aliases(catalog, version)  # again: see `alias.move`
    except InUseError:
        if tombstone == own:
            await catalog.writer.delete([version_records.tombstone_key(catalog.name, version)])
        raise
    return tombstone


async def expire(catalog: Catalog) -> list[str]:
    """Delete the versions whose grace period is over, by the store's clock; returns them. Their names stay taken.

    Those that aliases lead to stay.
    """
    contents = await catalog.contents(f"{version_records.REMOVED}/")
    deleted = list[str]()
    for version, tombstone in contents.removed.items():
        key = version_records.tombstone_key(catalog.name, version)
        age = await catalog.writer.age(key)
        if age is None or age < tombstone.delete_after - tombstone.removed:
            continue
        if await _leading(catalog, version):
            continue  # its removal died before it looked at the aliases again, or the alias's move has not done so yet
        await _delete_files(catalog, version)
        keys = (
            version_records.manifest_key,
            version_records.signature_key,
            version_records.fingerprints_key,
            version_records.reservation_key,
        )
        await catalog.writer.delete([each(catalog.name, version) for each in keys])
        # So that nobody pushes a version of this name, which another deletion that is late would delete.
        with suppress(ObjectChangedError):
            await catalog.writer.put_if_absent(version_records.deleted_key(catalog.name, version), tombstone.encode())
        # The tombstone is last: a deletion that dies is repeated, and the version stays hidden.
        await catalog.writer.delete([key])
        deleted.append(version)
    return deleted


async def remove_unfinished(catalog: Catalog, version: str) -> None:
    """Delete what a dead push has left of a version. A push that is not dead will notice, and fail.

    Raises VersionConflictError when the version is published, NoSuchEntryError when there is nothing of it.
    """
    ended = f"{catalog.of(version)}: its push has ended: remove it without --unfinished"
    if await catalog.manifest(version) is not None:
        raise VersionConflictError(ended)
    reserved = await catalog.reservation(version) is not None
    # The reservation is first: a push looks for it before it makes the manifest.
    await catalog.writer.delete([version_records.reservation_key(catalog.name, version)])
    if await catalog.manifest(version) is not None:  # the push had looked just before
        raise VersionConflictError(ended)
    await catalog.writer.delete([version_records.fingerprints_key(catalog.name, version)])
    deleted = await _delete_files(catalog, version)
    published = await catalog.manifest(version)
    if published is not None:
        prefix = f"{catalog.name}/{version}/"
        there = {stored.key.removeprefix(prefix) async for stored in catalog.writer.list(prefix)}
        if published.files.keys() <= there:  # a push that began meanwhile
            raise VersionConflictError(ended)
        # A push that had looked before, and made the manifest since, has published a version without files.
        await catalog.writer.delete([version_records.manifest_key(catalog.name, version)])
    if not reserved and not deleted:
        raise NoSuchEntryError(f"{catalog.of(version)}: there is nothing of it: see `trimsfs versions`")


async def _delete_files(catalog: Catalog, version: str) -> int:
    prefix = f"{catalog.name}/{version}/"
    keys = [stored.key async for stored in catalog.writer.list(prefix)]
    await catalog.writer.delete(keys)
    await catalog.writer.discard_uploads(prefix)
    return len(keys)


async def _check_no_alias(catalog: Catalog, name: str) -> None:
    alias = await catalog.alias(name)
    if alias is not None:
        key = f"{catalog.writer.location}/{version_records.alias_key(catalog.name, name)}"
        command = f"{f'{catalog.aws} s3 rm' if key.startswith('s3://') else 'rm'} {shlex.quote(key)}"
        raise NoSuchEntryError(
            f"{catalog.of(name)}: is an alias of {alias[0].version}: name a version; `{command}` removes the alias"
        )


async def _check_aliases(catalog: Catalog, version: str) -> None:
    leading = await _leading(catalog, version)
    if leading:
        raise InUseError(f"{catalog.of(version)}: alias {', '.join(leading)} leads to it: move that first")


async def _leading(catalog: Catalog, version: str) -> list[str]:
    """The aliases that lead to a version."""
    contents = await catalog.contents(f"{version_records.ALIASES}/")
    return [alias for alias, target in contents.aliases.items() if target.version == version]
