"""What must be known of a file's bytes before a program gets them: that they are signed, and the store's digest."""

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import trio

from trimsfs.control.control_files import shows_content
from trimsfs.errors import CacheFullError, TrimsError
from trimsfs.fetch.access_pattern import AccessPattern
from trimsfs.fetch.fetcher import Fetcher, lost_repeatedly
from trimsfs.integrity.signature_policy import SignaturePolicy, not_compared_with_signature
from trimsfs.namespace.inodes import Inode
from trimsfs.opening.cold_open import Interruptible, not_compared
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Buffer

T = TypeVar("T")

MOST_ATTEMPTS = 8
"""How often a read begins anew."""


class Trust:
    """Admits files to be opened, and reads of them.

    *compared* means that no bytes may be read before all of their file has been compared with the store's digest, as
    far as there is room for it. *signature_policy* is None where it does not matter what has been signed.
    """

    def __init__(
        self,
        disk: DiskTier,
        fetcher: Fetcher,
        passthrough: Passthrough,
        *,
        compared: bool,
        signature_policy: SignaturePolicy | None,
    ) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._passthrough = passthrough
        self._compared = compared
        self.signature_policy = signature_policy

    async def admit(self, blob: Blob, interruptible: Interruptible) -> None:
        """Return when a blob that the caller uses may be opened. Raises SignatureError, and as opens do."""
        if self.signature_policy is not None:
            await self.signature_policy.admit(blob, interruptible)

    async def admit_control(self, inode: Inode, name: str) -> None:
        """Return when a control file or attribute of an inode may be read. Raises as `admit`."""
        if self.signature_policy is not None and inode.generation is not None and shows_content(name):
            await self.signature_policy.admit_file(inode.generation, nullcontext)

    async def read(self, blob: Blob, start: int, stop: int, pattern: AccessPattern) -> Buffer:
        """The bytes ``[start, stop)`` of the blob of an open file. Raises as `Fetcher.read` and `wait`."""
        # What is not kept cannot be compared.
        told = None if self._compared or self.signature_policy is not None else pattern
        return await self._read_until_trusted(blob, partial(self._fetcher.read_once, blob, start, stop, told))

    async def wait(self, blob: Blob) -> None:
        """Return when the blob of an open file may be read.

        Raises BlobDamagedError or SignatureError for bytes that were lost and came back with another content, or have
        not been compared in time, and StoreError when they cannot be fetched.
        """
        await self._read_until_trusted(blob, _nothing)

    async def _read_until_trusted(self, blob: Blob, read: Callable[[], Awaitable[T | None]]) -> T:
        """What *read* gives once it may be trusted.

        An open file may lose bytes: they were found to be wrong, or did not reach the disk. So a read begins anew when
        - bytes were lost while it waited for others (*read* gives None);
        - what came for them has not been compared with the store's digest, where that has to be;
        - what came for them has not been compared with what was signed.
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
        """Whether what was read of a blob at this revision has to be compared with the store's digest first."""
        compared = blob.health.compared and blob.health.revision == revision
        return self._compared and blob.attached and not compared

    async def _compare(self, blob: Blob) -> bool:
        """Compare a blob with the store's digest; False if it cannot be, as the disk has no room for all of it."""
        if not blob.complete:
            if not blob.health.revision or self._disk.full(blob.generation):
                return False
            try:
                await self._fetcher.fetch_all(blob)
            except CacheFullError:
                return False
        await self._passthrough.register(blob)
        await trio.lowlevel.checkpoint_if_cancelled()  # who stops with the server says nothing of the file
        blob.health.check()
        return True


async def _nothing() -> bool:
    return True
