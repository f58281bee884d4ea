"""Trust: which checks a file's bytes must pass before a program gets them: signature, and the store's digest."""

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import trio

from trimsfs.errors import CacheFullError, TrimsError
from trimsfs.fetch.bypass import AccessPattern
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.fetch.flights import lost_repeatedly
from trimsfs.filesystem.rights import Rights
from trimsfs.integrity.signature_policy import SignaturePolicy, not_compared_with_signature
from trimsfs.namespace.inodes import Inode
from trimsfs.opening.cold_open import Interruptible, not_compared
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import Room
from trimsfs.types import Buffer, Generation

T = TypeVar("T")

MOST_ATTEMPTS = 8
"""Most attempts of one read."""


class Trust:
    """Admits opens and reads of files.

    With *compared*, no bytes are read before their whole file was compared with the store's digest, if the disk has
    room for it. *signature_policy* is None if signatures do not matter, *rights* if no tenant has credentials.
    *shows_content* is `Control.shows_content`.
    """

    def __init__(
        self,
        room: Room,
        fetcher: Fetcher,
        passthrough: Passthrough,
        *,
        compared: bool,
        signature_policy: SignaturePolicy | None,
        rights: Rights | None,
        shows_content: Callable[[str], bool],
    ) -> None:
        self._room = room
        self._fetcher = fetcher
        self._passthrough = passthrough
        self._compared = compared
        self.signature_policy = signature_policy
        self._rights = rights
        self._shows_content = shows_content

    def known(self, generation: Generation) -> bool:
        """Whether `check` and `admit` have nothing to wait for."""
        return self.signature_policy is None and (self._rights is None or self._rights.known(generation))

    async def check(self, generation: Generation, interruptible: Interruptible) -> None:
        """Return when a file may be opened at its path, before it is used. Raises as `Rights.check`."""
        if self._rights is not None and not self._rights.known(generation):
            with interruptible():
                await self._rights.check(generation)

    async def admit(self, blob: Blob, interruptible: Interruptible) -> None:
        """Return when a blob that the caller uses may be opened. Raises as `SignaturePolicy.admit`."""
        if self.signature_policy is not None:
            await self.signature_policy.admit(blob, interruptible)

    async def admit_control(self, inode: Inode, name: str) -> None:
        """Return when a control file or attribute of an inode may be read. Raises as `check` and `admit`."""
        if inode.generation is not None:
            await self.check(inode.generation, nullcontext)
        if self.signature_policy is not None and inode.generation is not None and self._shows_content(name):
            await self.signature_policy.admit_file(inode.generation, nullcontext)

    async def read(self, blob: Blob, start: int, stop: int, pattern: AccessPattern) -> Buffer:
        """The bytes ``[start, stop)`` of the blob of an open file. Raises as `Fetcher.read` and `wait`."""
        # With a pattern, random reads bypass the disk: their bytes could not be compared.
        bypass_pattern = None if self._compared or self.signature_policy is not None else pattern
        return await self._read_until_trusted(blob, partial(self._fetcher.read_once, blob, start, stop, bypass_pattern))

    async def wait(self, blob: Blob) -> None:
        """Return when the blob of an open file may be read.

        Raises BlobDamagedError or SignatureError when lost bytes came back with another content or were not compared
        in time, and StoreError when they cannot be fetched.
        """
        await self._read_until_trusted(blob, _nothing)

    async def _read_until_trusted(self, blob: Blob, read: Callable[[], Awaitable[T | None]]) -> T:
        """Repeat *read* until its result may be trusted.

        An open file may lose bytes: a check found them wrong, or they did not reach the disk. A read starts over when
        - bytes were lost while it waited for others (*read* returns None);
        - the refetched bytes were not yet compared with the store's digest, where that is required;
        - the refetched bytes were not yet compared with the signed digest, where that is required.
        """
        error: Callable[[Blob], TrimsError] = lost_repeatedly
        deadline: float | None = None
        for _ in range(MOST_ATTEMPTS):
            revision = blob.health.revision
            data = await read()
            if data is None:
                error = lost_repeatedly
                continue
            if self._must_be_compared(blob, revision) and await self._compare(blob):
                error = not_compared
                continue
            if self.signature_policy is not None and not await self.signature_policy.stands(blob):
                deadline = deadline or self.signature_policy.deadline()
                await self.signature_policy.wait_until_it_stands(blob, deadline)
                error = not_compared_with_signature
                continue
            return data
        raise error(blob)

    def _must_be_compared(self, blob: Blob, revision: int) -> bool:
        """Whether bytes read at *revision* must first be compared with the store's digest."""
        compared = blob.health.compared and blob.health.revision == revision
        return self._compared and blob.attached and not compared

    async def _compare(self, blob: Blob) -> bool:
        """Compare a blob with the store's digest. Returns False if the disk has no room for all of it."""
        if not blob.complete:
            if not blob.health.revision or self._room.full(blob.generation):
                return False
            try:
                await self._fetcher.fetch_all(blob)
            except CacheFullError:
                return False
        await self._passthrough.register(blob)
        await trio.lowlevel.checkpoint_if_cancelled()  # a stopping server says nothing of the file
        blob.health.check()
        return True


async def _nothing() -> bool:
    return True
