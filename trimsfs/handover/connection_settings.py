"""The settings of a FUSE connection: its first server negotiates them, and later servers keep them."""

import json
from dataclasses import asdict, dataclass

from trimsfs.handover.ledger import Ledger, RecordKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """What the first server requested: ``passthrough``, and whether for backing files on an ``overlay``.

    ``mounted_ns`` is the time of the mount, ``init`` the kernel's INIT message in hexadecimal digits, ``refusal`` the
    reason why passthrough is off. With ``direct``, the kernel maps files, too, of which it passes every read on.
    """

    passthrough: bool
    overlay: bool
    mounted_ns: int
    init: str = ""
    refusal: str | None = None
    direct: bool = False

    def record(self, ledger: Ledger) -> None:
        """Record the settings for later servers."""
        content = asdict(self)
        direct = content.pop("direct")  # as the record's number: an older server knows no such key
        ledger.add(RecordKind.CONNECTION, int(direct), json.dumps(content).encode())

    @classmethod
    def read(cls, ledger: Ledger) -> "ConnectionSettings | None":
        """The settings that the first server recorded; None for the first server itself."""
        records = ledger.inherited(RecordKind.CONNECTION)
        return cls(**json.loads(records[0].content), direct=bool(records[0].number)) if records else None
