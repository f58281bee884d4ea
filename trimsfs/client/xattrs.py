"""Reads the extended attributes ``user.trims.*`` of files on mounts.

The only home of the package xattr. An interpreter that `trimsfs run` starts may lack it: it is imported when needed.
"""

from pathlib import Path

PREFIX = "user.trims."


def read_attribute(file: Path | int, name: str) -> str:
    """The value of ``user.trims.NAME`` of a file, given by its path or an open descriptor.

    Raises OSError, as ENODATA for a file on no mount, and ImportError without the package xattr, or with
    another module of that name.
    """
    from xattr import getxattr  # noqa: PLC0415 - see above

    value: bytes = getxattr(file, PREFIX + name)
    return value.decode()
