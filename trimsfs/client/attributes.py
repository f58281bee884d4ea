"""Reads the extended attributes ``user.trims.*`` of files on mounts.

The only home of the package xattr. An interpreter that `trimsfs run` starts may lack it: it is imported when needed.
"""

from pathlib import Path

PREFIX = "user.trims."
LONGEST = 4096
"""Bytes of the longest value that is read."""


def read_attribute(file: Path | int, name: str) -> str:
    """The value of ``user.trims.NAME`` of a file, given by its path or an open descriptor.

    Raises OSError, as ENODATA for a file on no mount, and ModuleNotFoundError without the package xattr.
    """
    from xattr import lib  # noqa: PLC0415 - see above

    # xattr.getxattr asks for the size first, and the server gets two requests for each value.
    read = lib._fgetxattr if isinstance(file, int) else lib._getxattr
    value: bytes = read(file, PREFIX + name, LONGEST)
    return value.decode()
