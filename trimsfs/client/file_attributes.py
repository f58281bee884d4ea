"""Reads the extended attributes ``user.trims.*`` of files on mounts.

Only this module imports the package xattr, and only when needed: a Python that `trimsfs run` starts may lack it.
"""

from pathlib import Path

PREFIX = "user.trims."


def read_attribute(file: Path | int, name: str) -> str:
    """The value of ``user.trims.NAME`` of a file, given by its path or an open descriptor.

    Raises OSError, such as ENODATA for a file off a mount, and ImportError if xattr is missing or another module.
    """
    from xattr import getxattr  # noqa: PLC0415 - see above

    value: bytes = getxattr(file, PREFIX + name)
    return value.decode()
