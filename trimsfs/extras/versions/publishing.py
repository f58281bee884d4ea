"""Publishes a version: uploads what is missing of its files, and then, in one request, the manifest that shows it.

A reservation, made before anything else, names the content. Only pushes of that content write files of the version. So
they may run at the same time, die at any point and be repeated.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import ConfigurationError, ObjectChangedError, TrimsError, VersionConflictError
from trimsfs.extras.versions.catalog import Catalog, now
from trimsfs.extras.versions.content import Content
from trimsfs.extras.versions.description import Described, Digester, digester_of
from trimsfs.formats import fingerprints, version_records
from trimsfs.formats.version_records import Manifest, Reservation, VersionFile
from trimsfs.stores.writer import Stored, Upload, part_size

PARTS_AT_ONCE = 8
"""Most parts, and most small files, that are in memory and on their way."""
LARGE_AT_ONCE = 4
"""Most files whose parts are on their way."""

_MOST_NAMED = 3
"""Most directories that a message names."""

LONG_ETAG = f'"{"0" * 32}-10000"'
"""An ETag as long as those of S3 and of directories."""

Progress = Callable[[int], None]
"""Hears of bytes that are in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A version that readers see, and what this push sent of it; *repeated* if it was published before."""

    manifest: Manifest
    repeated: bool
    sent_files: int
    sent_bytes: int


def content_id(files: Mapping[str, Described]) -> str:
    """A digest of all that a version consists of, in hexadecimal digits."""
    entries = [[path, file.content.size, file.sha256] for path, file in sorted(files.items())]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


async def publish(
    catalog: Catalog, version: str, files: Mapping[str, Described], *, conditions: bool = True, progress: Progress
) -> Publication:
    """Publish files as a version, or go on with a push of the same files. A version that has them is left as it is.

    Raises VersionConflictError when the version has other files, was removed, or has damaged files. Also raises it when
    an alias has the version's name, or the version would be the first one of a model that holds directories. Raises
    ConfigurationError when the store ignores *conditions*, or the manifest would be too long to be read. Raises
    ObjectChangedError when a file changes meanwhile.
    """
    push = _Push(catalog, version, files, progress)
    push.manifest(dict.fromkeys(files, LONG_ETAG))  # before anything is uploaded
    manifest = await push.published()
    repeated = manifest is not None
    if manifest is not None:
        await push.check_files(manifest)
    else:
        await push.check_name()
        await push.check_directories()
        manifest = await push.reserve(conditions)
        if manifest is None:
            await push.upload()
            manifest = await push.make_manifest()
    await push.end_reservation()
    return Publication(manifest=manifest, repeated=repeated, sent_files=push.sent_files, sent_bytes=push.sent_bytes)


class _Push:
    def __init__(self, catalog: Catalog, version: str, files: Mapping[str, Described], progress: Progress) -> None:
        self._catalog = catalog
        self._writer = catalog.writer
        self._version = version
        self._files = files
        self._progress = progress
        self._prefix = f"{catalog.name}/{version}/"
        self._slots = trio.Semaphore(PARTS_AT_ONCE)
        self._large = trio.CapacityLimiter(LARGE_AT_ONCE)
        self._fingerprints = {path: file.fingerprint for path, file in files.items()}
        self._made = False
        self.sent_files = self.sent_bytes = 0

    async def published(self) -> Manifest | None:
        """The manifest, if the version is published with these files. Raises VersionConflictError."""
        manifest = await self._catalog.manifest(self._version)
        await self._check_removed()
        if manifest is None:
            return None
        theirs = {path: (file.size, file.sha256) for path, file in manifest.files.items()}
        if theirs != {path: (file.content.size, file.sha256) for path, file in self._files.items()}:
            raise self._conflict("it is published with other files: choose another version")
        return manifest

    async def check_files(self, manifest: Manifest) -> None:
        """Raises VersionConflictError when a file of the version is not in the store as it was published.

        Only those are looked at by content whose ETags are others: a directory has others for a file that was put back.
        """
        there = {one.key.removeprefix(self._prefix): one.etag async for one in self._writer.list(self._prefix)}
        for path, file in manifest.files.items():
            if there.get(path) == file.etag:
                continue
            stored = await self._writer.find(self._prefix + path)
            if stored is None or (stored.size, stored.sha256) != (file.size, file.sha256):
                state = "is missing in the store" if stored is None else "in the store is not what was published"
                raise self._conflict(f"{path} {state}: put it back, or remove the version and push under another name")

    async def _check_removed(self) -> None:
        tombstone = await self._catalog.removed(self._version)
        if tombstone is not None:
            raise self._conflict(f"it was removed at {version_records.text(tombstone.removed)}: choose another version")

    async def check_name(self) -> None:
        """Raises VersionConflictError when an alias has the name of the version, or its model lies in another one."""
        above = await self._catalog.model_above()
        if above is not None:
            raise self._conflict(above)
        if await self._catalog.alias(self._version) is not None:
            raise self._conflict("an alias has this name: choose another version")

    async def check_directories(self) -> None:
        """Raises VersionConflictError when a first version would hide directories that no push has made.

        A mount shows no other directories of a model than its versions. Hidden ones, such as a download's ``.cache``,
        hold nothing that a program would miss.
        """
        model = f"{self._catalog.name}/"
        directories = sorted([name async for name in self._writer.directories(model) if not name.startswith(".")])
        # Only now: a push that began meanwhile has written its reservation before it made a directory.
        if not directories or await self._catalog.has_versions():
            return
        foreign = [name for name in directories if [one async for one in self._writer.list(f"{model}{name}/")]]
        if foreign:
            named = ", ".join([*foreign[:_MOST_NAMED], *(["…"] if len(foreign) > _MOST_NAMED else [])])
            raise VersionConflictError(
                f"{self._writer.location}/{self._catalog.name}: it holds directories that no push has made, and that "
                f"would vanish from the mount: {named}: choose another name"
            )

    async def reserve(self, conditions: bool) -> Manifest | None:
        """Reserve the version for these files, or go on with a push of them. The manifest, if one has ended meanwhile.

        Raises VersionConflictError and ConfigurationError as `publish` does.
        """
        made = self._made = await self._make_reservation(conditions)
        if made:
            await self._writer.discard_uploads(self._prefix)  # of other content, from before a removal
        try:
            await self.check_name()  # again: who makes an alias looks for a reservation after the alias is there
        except VersionConflictError:
            if made:
                await self.end_reservation()
            raise
        try:
            # Only now: a push that ends deletes its reservation after it has made the manifest.
            return await self.published()
        except VersionConflictError:
            await self.end_reservation()
            raise

    async def end_reservation(self) -> None:
        """Delete the reservation of a version that is published, or cannot be."""
        await self._writer.delete([version_records.reservation_key(self._catalog.name, self._version)])

    async def _make_reservation(self, conditions: bool) -> bool:
        """Returns whether this push has made it, and no earlier one of the same files."""
        key, content = version_records.reservation_key(self._catalog.name, self._version), content_id(self._files)
        reservation = Reservation(version=self._version, content=content, started=now()).encode()
        while True:
            try:
                await self._writer.put_if_absent(key, reservation)
                break
            except ObjectChangedError:
                prior = await self._catalog.reservation(self._version)
            if prior is not None and prior.content != content:
                raise self._conflict(
                    f"a push of other files has begun at {version_records.text(prior.started)}: let it end, or, if it "
                    f"is dead, `trimsfs rm --unfinished {self._catalog.of(self._version)}`"
                )
            if prior is not None:
                return False
        if conditions:
            await self._check_conditions(key, reservation)
        return True

    async def _check_conditions(self, key: str, reservation: bytes) -> None:
        try:
            await self._writer.put_if_absent(key, reservation)
        except ObjectChangedError:
            return
        await self.end_reservation()
        raise self._catalog.without_conditions("If-None-Match")

    async def upload(self) -> None:
        """Upload what is not there."""
        try:
            there = await self._there()
        except VersionConflictError:
            if self._made:
                await self.end_reservation()
            raise
        async with trio.open_nursery() as nursery:
            for path, file in self._files.items():
                nursery.start_soon(self._put, path, file, path in there)

    async def _there(self) -> dict[str, Stored]:
        """The files in the store by path. Raises VersionConflictError for any that are none of this version."""
        there = {one.key.removeprefix(self._prefix): one async for one in self._writer.list(self._prefix)}
        for path, stored in there.items():
            if path not in self._files or stored.size != self._files[path].content.size:
                raise self._foreign(path)
        return there

    async def _put(self, path: str, file: Described, there: bool) -> None:
        if not there and file.content.size > part_size(file.content.size):
            async with self._large:
                await self._put_large(path, file)
            return
        async with self._slots:
            if there:
                await self._check(path)
                self._progress(file.content.size)
            else:
                await self._put_small(path, file)

    async def _check(self, path: str) -> None:
        """Check that a file in the store has the content of this version's."""
        stored = await self._writer.find(self._prefix + path)
        if stored is None or stored.sha256 != self._files[path].sha256:
            raise self._foreign(path)

    async def _put_small(self, path: str, file: Described) -> None:
        digester = await self._digester(path, file)
        data = await file.content.read(0, file.content.size)
        digester.update(data)
        if digester.hexdigest() != file.sha256:
            raise self._changed(path)
        self._digested(path, digester)
        try:
            await self._writer.put_if_absent(self._prefix + path, data, sha256=file.sha256)
        except ObjectChangedError:
            await self._check(path)  # another push of these files was quicker
        self._sent(len(data))
        self.sent_files += 1

    async def _put_large(self, path: str, file: Described) -> None:
        upload = await self._writer.upload(self._prefix + path, file.content.size, file.sha256)
        digester = await self._digester(path, file)
        ours = await self._put_parts(upload, file.content, digester)
        if ours and digester.hexdigest() != file.sha256:
            await self._writer.discard_uploads(self._prefix + path)
            raise self._changed(path)
        try:
            if ours:
                self._digested(path, digester)
                await upload.complete()
        except ObjectChangedError:
            ours = False
        if not ours:
            await self._check(path)  # another push of these files has ended this upload
        self.sent_files += 1

    async def _digester(self, path: str, file: Described) -> "Digester | hashlib._Hash":
        """What computes a file's SHA-256 and, if nobody has read it before, its fingerprint."""
        if file.fingerprint is not None:
            return hashlib.sha256()
        return await digester_of(path, file.content)

    def _digested(self, path: str, digester: "Digester | hashlib._Hash") -> None:
        if isinstance(digester, Digester):
            self._fingerprints[path] = digester.fingerprint()

    async def _put_parts(self, upload: Upload, content: Content, digester: "Digester | hashlib._Hash") -> bool:
        """Read and put the parts of a file, several at once; False if somebody else ends the upload."""
        count = -(-content.size // upload.part_size)
        turns = [trio.Event() for _ in range(count + 1)]
        turns[0].set()
        ended = False

        async def put(number: int) -> None:
            nonlocal ended
            try:
                offset = number * upload.part_size
                data = await content.read(offset, min(upload.part_size, content.size - offset))
                await turns[number].wait()  # to digest them in order
                await in_thread(digester.update, data)
                turns[number + 1].set()
                try:
                    sent = await upload.put_part(number, data)
                except ObjectChangedError:
                    ended = True
                    nursery.cancel_scope.cancel()
                else:
                    (self._sent if sent else self._progress)(len(data))
            finally:
                self._slots.release()

        async with trio.open_nursery() as nursery:
            for number in range(count):
                await self._slots.acquire()  # in order: the part whose turn it is always has one
                nursery.start_soon(put, number)
        return not ended

    async def make_manifest(self) -> Manifest:
        """Show the version: the last step, once all files are in the store as they must be."""
        there = await self._there()
        reservation = await self._catalog.reservation(self._version)
        if reservation is None and (other := await self.published()) is not None:
            return other
        if reservation is None or reservation.content != content_id(self._files):
            raise self._conflict("somebody has removed it while it was pushed: push again")
        if there.keys() != self._files.keys():
            raise self._conflict("files of it were deleted while it was pushed: push again")
        await self._put_fingerprints()
        manifest, encoded = self.manifest({path: stored.etag for path, stored in there.items()})
        key = version_records.manifest_key(self._catalog.name, self._version)
        try:
            await self._writer.put_if_absent(key, encoded)
        except ObjectChangedError:  # by another push, or an attempt of which the answer was lost
            other = await self.published()
            if other is None:
                raise self._conflict("somebody has removed it while it was pushed: push again") from None
            return other
        try:
            await self._check_removed()  # since another push had made the manifest
        except VersionConflictError:
            await self._writer.delete([key])
            raise
        return manifest

    def manifest(self, etags: Mapping[str, str]) -> tuple[Manifest, bytes]:
        """The manifest of the files, which have these ETags. Raises ConfigurationError if it is too long."""
        files = {
            path: VersionFile(size=file.content.size, sha256=file.sha256, etag=etags[path])
            for path, file in self._files.items()
        }
        manifest = Manifest(version=self._version, created=now(), files=files)
        encoded = manifest.encode()
        if len(encoded) > version_records.MOST_BYTES:
            raise ConfigurationError(
                f"{self._catalog.of(self._version)}: the manifest of {len(files)} files would be longer than "
                f"{version_records.MOST_BYTES >> 20} MiB: push fewer files, or shorter names"
            )
        return manifest, encoded

    async def _put_fingerprints(self) -> None:
        """Put what `trimsfs diff` compares. Two pushes of the same files put the same, but for what an import that did
        not end has uploaded."""
        known = {path: fingerprint for path, fingerprint in self._fingerprints.items() if fingerprint is not None}
        data = fingerprints.encode(self._version, known)
        if known and len(data) <= version_records.MOST_BYTES:
            with suppress(ObjectChangedError):
                await self._writer.put_if_absent(
                    version_records.fingerprints_key(self._catalog.name, self._version), data
                )

    def _sent(self, count: int) -> None:
        self.sent_bytes += count
        self._progress(count)

    def _changed(self, path: str) -> TrimsError:
        return ObjectChangedError(
            f"{path}: it is not what its digest says: push again once nobody writes to it, or look at the source"
        )

    def _foreign(self, path: str) -> VersionConflictError:
        if self._made:  # so no push has left it
            return self._conflict(f"{path} is there, and not by a push: choose another version")
        return self._conflict(
            f"{path} in the store is not of this version: `trimsfs rm --unfinished {self._catalog.of(self._version)}`"
        )

    def _conflict(self, reason: str) -> VersionConflictError:
        return VersionConflictError(f"{self._catalog.of(self._version)}: {reason}")
