"""The terms of a connection to the kernel: what its first server asked for, and each later one goes by."""

import json
from dataclasses import asdict, dataclass

from trimsfs.handover.ledger import Ledger, RecordKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Whether ``passthrough`` was asked for, and backing files on an ``overlay``; when it was mounted.

    ``init`` is the kernel's INIT message in hexadecimal digits, ``refusal`` why no file can be passed through.
    """

    passthrough: bool
    overlay: bool
    mounted_ns: int
    init: str = ""
    refusal: str | None = None

    def record(self, ledger: Ledger) -> None:
        """Leave the terms to the servers that come later."""
        ledger.add(RecordKind.CONNECTION, 0, json.dumps(asdict(self)).encode())


def recorded(ledger: Ledger) -> Terms | None:
    """The terms that the first server left, if this is a later one."""
    records = ledger.taken(RecordKind.CONNECTION)
    return Terms(**json.loads(records[0].content)) if records else None
