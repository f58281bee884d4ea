"""Moves aliases: one conditional request, so that of two who move one at the same time, one hears of the other."""

from trimsfs.errors import NoSuchEntryError, ObjectChangedError, VersionConflictError
from trimsfs.extras.versions.catalog import Catalog, now
from trimsfs.formats import version_records
from trimsfs.formats.version_records import HISTORY, Alias


async def move(catalog: Catalog, alias: str, version: str, *, conditions: bool = True) -> Alias:
    """Let an alias lead to a version; the alias as it is now.

    Raises NoSuchEntryError when there is no such version. Raises VersionConflictError when a version has the name of
    the alias, or when somebody else moves it or removes the version at the same time. Raises ConfigurationError when
    the store ignores conditions, unless *conditions* is false.
    """
    await catalog.published(version)
    await _check_name(catalog, alias)
    if conditions:
        await catalog.check_conditions()
    current = await catalog.alias(alias)
    if current is None:
        moved = await _move(catalog, alias, Alias(version=version, history=(), moved=now()), None)
        try:
            await _check_name(catalog, alias)  # again: a push looks for an alias after its reservation is there
        except VersionConflictError:
            await _withdraw(catalog, alias, moved, None)
            raise
        return moved
    before = current[0]
    if before.version == version:
        return before
    history = (before.version, *before.history)[:HISTORY]
    return await _move(catalog, alias, Alias(version=version, history=history, moved=now()), current)


async def rollback(catalog: Catalog, alias: str, *, conditions: bool = True) -> Alias:
    """Let an alias lead to where it led before; the alias as it is now. It forgets where it leads to now.

    Versions that were removed meanwhile are skipped. Raises NoSuchEntryError when there is no alias or nothing before,
    and as `move`.
    """
    current = await catalog.alias(alias)
    if current is None:
        raise NoSuchEntryError(f"{catalog.of(alias)}: no such alias: see `trimsfs versions`")
    if conditions:
        await catalog.check_conditions()
    before = current[0]
    for place, version in enumerate(before.history):
        if await catalog.tombstone(version) is None and await catalog.manifest(version) is not None:
            earlier = before.history[place + 1 :]
            return await _move(catalog, alias, Alias(version=version, history=earlier, moved=now()), current)
    raise NoSuchEntryError(
        f"{catalog.of(alias)}: it has led to no other version that is still there: move it by `trimsfs alias`"
    )


async def _move(catalog: Catalog, alias: str, moved: Alias, current: tuple[Alias, str] | None) -> Alias:
    """Replace the *current* alias, and check that its target is not removed at the same time."""
    await _put(catalog, alias, moved, current[1] if current else None)
    if await catalog.removed(moved.version) is None:
        return moved
    # Whoever removes a version looks at the aliases after the tombstone is there: one of the two sees the other.
    await _withdraw(catalog, alias, moved, current)
    raise VersionConflictError(f"{catalog.of(moved.version)}: somebody is removing it: alias {alias} is as it was")


async def _withdraw(catalog: Catalog, alias: str, moved: Alias, current: tuple[Alias, str] | None) -> None:
    """Undo a move, unless somebody else has moved the alias since."""
    there = await catalog.alias(alias)
    if there is not None and there[0] == moved:
        if current is None:
            await catalog.writer.delete([version_records.alias_key(catalog.name, alias)])
        else:
            await _put(catalog, alias, current[0], there[1])


async def _check_name(catalog: Catalog, alias: str) -> None:
    """Raises VersionConflictError when a version has the name of an alias, or is being pushed."""
    # In this order: a push deletes its reservation after it has made the manifest.
    if await catalog.reservation(alias) is not None or await catalog.manifest(alias) is not None:
        raise VersionConflictError(f"{catalog.of(alias)} is a version: choose another name for the alias")


async def _put(catalog: Catalog, alias: str, moved: Alias, etag: str | None) -> None:
    key = version_records.alias_key(catalog.name, alias)
    try:
        if etag is None:
            await catalog.writer.put_if_absent(key, moved.encode())
        else:
            await catalog.writer.put_if_match(key, moved.encode(), etag)
    except ObjectChangedError:
        there = await catalog.alias(alias)
        if there is not None and there[0] == moved:
            return  # an attempt of which the answer was lost
        target = f"now leads to {there[0].version}" if there else "is gone"
        raise VersionConflictError(f"alias {alias}: somebody else has moved it: it {target}: try again") from None
