"""What a server may say to its keeper: a handful of messages, each of which is checked before it is believed.

A server is not privileged, and reads what comes from a network: its keeper believes nothing of it but this.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

MESSAGE_LIMIT = 8192
DESCRIPTOR_LIMIT = 1
_KIND = re.compile(r"[A-Za-z]{1,64}")
_VERSION = re.compile(r"[0-9a-z.]{1,16}")
_TEXT_LIMIT = 4096
_ID_LIMIT = (1 << 31) - 1


class ProtocolError(Exception):
    """A message that no server of ours sends."""


@dataclass(frozen=True, slots=True)
class StandingBy:
    """The server could serve, and reads ledgers of this version."""

    ledger: str


@dataclass(frozen=True, slots=True)
class Mount:
    """Mount the file system; with the descriptor of the locked cache directory. Answered with /dev/fuse's."""


@dataclass(frozen=True, slots=True)
class BackingOpen:
    """Register the file of the descriptor that comes with it. Answered with its id, or the error."""


@dataclass(frozen=True, slots=True)
class BackingClose:
    """Give the backing id up."""

    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The mount answers; ``resends`` tells whether another server could go on with it."""

    resends: bool


@dataclass(frozen=True, slots=True)
class Alive:
    """The server's event loop comes round."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is no mount, or no longer: the class of the error and one line."""

    kind: str
    error: str


Message = StandingBy | Mount | BackingOpen | BackingClose | Ready | Alive | Failed
_PLAIN: dict[str, Message] = {
    "mount": Mount(),
    "backing-open": BackingOpen(),
    "alive": Alive(),
}
_WITH_DESCRIPTOR = (Mount, BackingOpen)


def parse(data: bytes) -> Message:
    """The message that these bytes are. Raises ProtocolError."""
    try:
        fields: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolError("not JSON") from None
    match fields:
        case {"type": str(kind), **nothing} if kind in _PLAIN and not nothing:
            return _PLAIN[kind]
        case {"type": "standing-by", "ledger": str(ledger), **nothing} if not nothing:
            if _VERSION.fullmatch(ledger):
                return StandingBy(ledger)
        case {"type": "backing-close", "id": number, **nothing} if not nothing:
            if type(number) is int and 0 < number <= _ID_LIMIT:
                return BackingClose(number)
        case {"type": "ready", "resends": bool(resends), **nothing} if not nothing:
            return Ready(resends)
        case {"type": "failed", "kind": str(kind), "error": str(error), **nothing} if not nothing:
            if _KIND.fullmatch(kind):
                return Failed(kind, printable(error[:_TEXT_LIMIT]))
    raise ProtocolError("not one of the messages")


def takes_descriptor(message: Message) -> bool:
    """Whether a descriptor comes with a message."""
    return isinstance(message, _WITH_DESCRIPTOR)


def printable(text: str) -> str:
    """Text as one line that does nothing to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
