"""What the tests of signed files have in common."""

from pathlib import Path

from tests.support.parts import blob_files, blob_of, fail_to_sync
from tests.support.served import Server
from tests.support.signing import new_key
from trimsfs.tiers.blob import Blob

KEY = new_key()


def cached(directory: Path, content: bytes) -> Path:
    """The file in the cache that is of the size of a content, which no other is of."""
    (file,) = [file for file in blob_files(directory / "cache") if file.stat().st_size == len(content)]
    return file


async def opened_and_lost(server: Server) -> tuple[int, Blob]:
    """A handle of a signed file that could not be synced after its open, so that its bytes count as lost; its blob."""
    handle = await server.open("signed/params")
    blob = blob_of(server.disk, server.store, "signed/params")
    await fail_to_sync(server.disk, blob)
    assert not blob.complete
    return handle, blob
