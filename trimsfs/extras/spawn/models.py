"""The files of models that a fork server maps."""

import os
from collections.abc import Iterable, Sequence

from trimsfs.extras.spawn.python_command import PlainError


def files_of(models: Sequence[str]) -> list[tuple[str, int, int, int, int]]:
    """The files at and below some paths, with what tells a version of each from others. Raises PlainError."""
    found = []
    for model in models:
        path = os.path.realpath(model)
        try:
            for file in sorted(_below(path)):
                status = os.stat(file)
                found.append((file, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise PlainError(f"{error.filename}: {error.strerror}") from error
    return found


def _below(path: str) -> Iterable[str]:
    if not os.path.isdir(path):
        yield path
    else:
        for directory, _, names in os.walk(path, onerror=_fail):
            yield from (os.path.join(directory, name) for name in names)


def _fail(error: OSError) -> None:
    raise error
