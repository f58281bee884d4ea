"""Loads copies from blobs to devices, while the blobs' bytes still arrive from the store."""

import logging

import trio

from trimsfs.errors import CacheUnusableError, DeviceError, DeviceFullError, TrimsError
from trimsfs.extras.gpu.copy_ledger import CopyLedger
from trimsfs.extras.gpu.cuda import CudaError, IpcMemory, VmmMemory
from trimsfs.extras.gpu.tier.leased_copies import Copy, Pool
from trimsfs.extras.gpu.tier.staging import BlobSource, fill
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse

log = logging.getLogger(__name__)


class CopyLoader:
    """Fills copies from blobs. *in_memory* says whether the cache directory is in memory, as on a tmpfs."""

    def __init__(self, blobs: BlobUse, fetcher: Fetcher, ledger: CopyLedger, *, in_memory: bool) -> None:
        self._blobs = blobs
        self._fetcher = fetcher
        self._ledger = ledger
        self._in_memory = in_memory

    async def load(self, pool: Pool, copy: Copy) -> None:
        """Load a copy that a pool has added; sets its ``done`` at the end, and its ``error`` on failure."""
        key, began = copy.generation.key, trio.current_time()
        copy.error = DeviceError(f"{key}: loading was cancelled")
        try:
            with copy.scope:
                await self._fill(pool, copy)
                await self._ledger.record_copy(copy)
                copy.error = None
        except TrimsError as error:
            copy.error = error
        except CudaError as error:  # no pinned host memory
            copy.error = DeviceFullError(f"{key}: {error}")
        except OSError as error:
            copy.error = CacheUnusableError(f"{key}: the cache file cannot be read: {error}")
        except Exception as error:  # a defect: it ends this load, not the server
            log.exception("/%s: loading to %s failed", key, copy.device)
            copy.error = DeviceError(f"{key}: internal error: {error!r}")
        finally:
            copy.load_s = trio.current_time() - began
            if copy.error is None:
                pool.counts.loads += 1
                pool.counts.loaded_bytes += copy.layout.nbytes
                pool.counts.load_seconds += copy.load_s
                part = f"@{copy.key.pattern}" if copy.key.pattern else ""
                what = f"/{key}{part} to {copy.device} ({copy.key.memory})"
                log.info("loaded %s: %d bytes in %.3f s", what, copy.layout.nbytes, copy.load_s)
            else:
                if not copy.scope.cancelled_caught:
                    pool.counts.failed_loads += 1
                    log.info("load to %s failed: %s", copy.device, copy.error)  # the caller logs at its own level
                with trio.CancelScope(shield=True):
                    await pool.discard(copy)
            copy.done.set()

    async def _fill(self, pool: Pool, copy: Copy) -> None:
        async with self._blobs.using(copy.generation) as blob:
            self._fetcher.hold(blob)  # prefetches the missing bytes
            try:
                await pool.allocate(copy)
                assert copy.memory is not None
                await pool.device.clear(copy.memory)
                await fill(pool.device, copy.memory.address, copy.layout, self.source(blob))
                await pool.device.run(_make_shareable, copy)
            finally:
                self._fetcher.unhold(blob)

    def source(self, blob: Blob) -> BlobSource:
        """A source for copies of a blob, which the caller keeps in use."""
        return BlobSource(blob, self._fetcher, in_memory=self._in_memory)


def _make_shareable(copy: Copy) -> None:
    """Write-protect a loaded vmm copy, and create the descriptor or handle to share. For the device's thread."""
    match copy.memory:
        case VmmMemory():
            copy.memory.protect(writable=False)
            copy.descriptor = copy.memory.export()
        case IpcMemory():
            copy.handle = copy.memory.handle()
