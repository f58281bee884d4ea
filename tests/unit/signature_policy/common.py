"""What the tests of signed files have in common."""

from pathlib import Path

from tests.support.parts import blob_files
from tests.support.signing import new_key

KEY = new_key()


def cached(directory: Path, content: bytes) -> Path:
    """The file in the cache that is of the size of a content, which no other is of."""
    (file,) = [file for file in blob_files(directory / "cache") if file.stat().st_size == len(content)]
    return file
