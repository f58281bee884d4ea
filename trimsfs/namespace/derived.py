"""The keys of derived blobs: what programs derived from a model in memory, for other programs of the same user.

They are in the cache, and the store has no such object: the mount hides objects below any ``.trims``.
"""

import re

from trimsfs.types import Generation

_NAME = re.compile(r"derived-([0-9]{1,10})-([0-9])")
_KEY = re.compile(r"(|.*/)\.trims/([^/]+)/derived-[0-9]+-[0-9]", re.DOTALL)


def owner(name: str) -> int | None:
    """The user id in the file name of a derived blob; None for another name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def derived_key(model: Generation, name: str) -> str:
    """The key of a model's derived blob by its file name."""
    prefix, slash, file = model.key.rpartition("/")
    return f"{prefix}{slash}.trims/{file}/{name}"


def model_key(key: str) -> str | None:
    """The key of the model of a derived blob; None for any other key."""
    match = _KEY.fullmatch(key)
    return f"{match[1]}{match[2]}" if match else None
