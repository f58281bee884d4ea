"""The messages from a server to its keeper, and their validation.

A server is unprivileged and reads from a network: its keeper accepts nothing from it but these messages.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from trimsfs.text import printable

MESSAGE_LIMIT = 8192
BACKING_LIMIT = 32
"""How many files one message may register."""
DESCRIPTOR_LIMIT = BACKING_LIMIT
_KIND = re.compile(r"[A-Za-z]{1,64}")
_VERSION = re.compile(r"[0-9a-z.]{1,16}")
_TEXT_LIMIT = 4096
_NUMBER_LIMIT = (1 << 31) - 1


class ProtocolError(Exception):
    """A message is invalid, or out of order."""


@dataclass(frozen=True, slots=True)
class StandingBy:
    """The server can take over; it reads ledgers of this version. ``forks``: when promoted, it forks the next."""

    ledger: str
    forks: bool = False


@dataclass(frozen=True, slots=True)
class Mount:
    """Mount the file system; comes with the descriptor of the cache directory's lock. Answered with /dev/fuse's."""


@dataclass(frozen=True, slots=True)
class BackingOpen:
    """Register the files of *count* descriptors that come with it. Answered with the id or the error of each.

    Earlier versions send one descriptor without a count, and get one answer.
    """

    count: int | None = None


@dataclass(frozen=True, slots=True)
class BackingClose:
    """Unregister a backing id."""

    number: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Store the descriptor that comes with it, under this number. Answered with {}, or the error."""

    number: int


@dataclass(frozen=True, slots=True)
class LetGo:
    """Close the descriptor that is stored under this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Answered with the descriptor that is stored under this number, or the error."""

    number: int


@dataclass(frozen=True, slots=True)
class Listen:
    """Answered with the socket of GPU clients, and its path, or the error."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The mount answers; ``resends`` tells whether another server could take it over."""

    resends: bool


@dataclass(frozen=True, slots=True)
class Alive:
    """The server's event loop runs."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why the server ends: the class of the error and one line."""

    kind: str
    error: str


Message = StandingBy | Mount | BackingOpen | BackingClose | Hold | LetGo | Recall | Listen | Ready | Alive | Failed
_PLAIN: dict[str, Message] = {
    "mount": Mount(),
    "backing-open": BackingOpen(),
    "listen": Listen(),
    "alive": Alive(),
}
_NUMBERED: dict[str, Callable[[int], Message]] = {"hold": Hold, "let-go": LetGo, "recall": Recall}
_WITH_DESCRIPTOR = (Mount, Hold)


def parse(data: bytes) -> Message:
    """Parse a message. Raises ProtocolError."""
    try:
        fields: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolError("not JSON") from None
    match fields:
        case {"type": str(kind), **nothing} if kind in _PLAIN and not nothing:
            return _PLAIN[kind]
        case {"type": "standing-by", "ledger": str(ledger), **forks} if forks in ({}, {"forks": True}):
            if _VERSION.fullmatch(ledger):
                return StandingBy(ledger, forks=bool(forks))
        case {"type": "backing-open", "count": count, **nothing} if not nothing and _is_count(count):
            return BackingOpen(count)
        case {"type": "backing-close", "id": number, **nothing} if not nothing:
            if _is_number(number):
                return BackingClose(number)
        case {"type": str(kind), "number": number, **nothing} if kind in _NUMBERED and not nothing:
            if _is_number(number):
                return _NUMBERED[kind](number)
        case {"type": "ready", "resends": bool(resends), **nothing} if not nothing:
            return Ready(resends)
        case {"type": "failed", "kind": str(kind), "error": str(error), **nothing} if not nothing:
            if _KIND.fullmatch(kind):
                return Failed(kind, printable(error)[:_TEXT_LIMIT])
    raise ProtocolError("not one of the messages")


def _is_count(value: object) -> TypeGuard[int]:
    return _is_number(value) and value <= BACKING_LIMIT


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= _NUMBER_LIMIT


def most_descriptors(message: Message) -> int:
    """How many descriptors may come with a message; fewer do if the keeper has no room for them."""
    if isinstance(message, BackingOpen):
        return message.count or 1
    return 1 if isinstance(message, _WITH_DESCRIPTOR) else 0
