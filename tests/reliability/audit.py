"""What must hold of a server at any moment, and what once nobody uses it any more."""

from collections import Counter

import crc32c
import trio

from tests.support.parts import blob_files
from tests.support.served import Server
from trimsfs.filesystem.handles import BACKING_SHIFT, passed_through
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.ranges import chunk_span


def content_of_blob(server: Server, blob: Blob) -> bytes:
    """What the store gave, or would have given, for the generation of a blob."""
    return server.store.contents[blob.generation.key, blob.generation.etag]


def check_bytes(server: Server, blob: Blob) -> None:
    """Whatever a blob would be served from is right."""
    content = content_of_blob(server, blob)
    for chunk, state in enumerate(blob.states):
        if state == ChunkState.VERIFIED:
            start, stop = blob.span_of(chunk)
            assert blob.view(start, stop) == content[start:stop], f"{blob.generation.key}: chunk {chunk} is wrong"


def check(server: Server) -> None:
    """Nothing in use has gone, nothing is used twice, and no more is kept than may be."""
    disk, files = server.disk, server.filesystem.handles.files
    statistics = disk.statistics()
    assert statistics.used_bytes >= 0
    if statistics.budget_bytes is not None:
        assert statistics.used_bytes <= statistics.budget_bytes
    for handle, file in files.items():
        blob = file.blob
        assert disk.blobs.known(blob.token) is blob, f"{blob.generation.key} is open and has been evicted"
        assert blob.users > 0
        assert handle >> BACKING_SHIFT in {0, blob.backing_id}
    modes = Counter((file.inode, passed_through(handle)) for handle, file in files.items())
    for inode in {file.inode for file in files.values()}:
        assert (inode.cached, inode.passed) == (modes[inode, False], modes[inode, True])
    if server.backing is not None:
        assert server.backing.violations == []
        announced = [blob.backing_id for blob in disk._state.blobs.values() if blob.backing_id]
        assert len(announced) == len(set(announced))
        assert set(announced) == server.backing.open_ids


async def check_at_rest(server: Server, *, damaged: bool = False) -> None:
    """Close everything and give every inode back: nothing is left in use, and the index agrees with the blobs.

    In a cache that was *damaged* between two servers, what has not been used since may be wrong.
    """
    await server.idle()
    server.forget()
    assert server.namespace.statistics().inodes == 1, list(server.namespace.inodes)
    check(server)
    assert not server.fetcher._scheduler._prefetches, "held by nobody, and fetched on"
    assert not server.passthrough._registering
    assert not server.host._loading
    for hosted in server.host._hosted.values():
        assert (hosted.address is not None) <= hosted.blob.pinned, f"{hosted.blob.generation.key} is locked in memory"
    disk = server.disk
    await trio.sleep(0.2)  # the tier goes on to evict and to record by itself
    for _ in range(100):
        residencies = await disk.residencies.all()
        recorded = sum(here.disk_bytes for here in residencies)
        if disk.statistics().used_bytes == recorded:
            break
        await trio.sleep(0.02)
    assert disk.statistics().used_bytes == recorded
    assert {path.name for path in blob_files(disk.directory)} <= {here.token for here in residencies}
    for here in residencies:
        content = server.store.contents[here.generation.key, here.generation.etag]
        loaded = disk.index.load(here.token)
        assert loaded is not None
        for record in loaded[1]:
            start, stop = chunk_span(record.chunk, len(content), disk.chunk_size)
            assert record.length == stop - start
            assert record.crc == crc32c.crc32c(content[start:stop])
            blob = disk.blobs.known(here.token)
            # What an earlier server left may be damaged: it is checked before its first use.
            if not damaged if blob is None else blob.states[record.chunk] == ChunkState.VERIFIED:
                with disk.files.path(here.token).open("rb") as file:
                    file.seek(start)
                    assert file.read(record.length) == content[start:stop], f"{here.generation.key} is wrong on disk"
    for blob in disk._state.blobs.values():
        check_bytes(server, blob)
        assert blob.present_bytes == next((h.disk_bytes for h in residencies if h.token == blob.token), 0)
