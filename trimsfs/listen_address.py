"""Addresses that a process listens at: ``127.0.0.1:9099``, ``[::1]:9099`` or ``unix:/run/trimsfs/metrics.sock``."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

_TCP = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<four>[^:\[\]]+)):(?P<port>\d{1,5})")
MOST_PORT = 65535
_LONGEST_PATH = 107
"""Bytes that the path of a Unix socket may have."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """A Unix socket's ``path``, or an IP address and a port; port 0 has the kernel choose one."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    @property
    def local(self) -> bool:
        """Whether only programs of this host can connect."""
        return self.path is not None or ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> ListenAddress:
    """The address that a text names. Raises ValueError: the rest of a sentence that begins with the text."""
    if text.startswith("unix:"):
        path = Path(text.removeprefix("unix:"))
        if not path.is_absolute() or len(bytes(path)) > _LONGEST_PATH:
            raise ValueError(f"is not an absolute path of at most {_LONGEST_PATH} bytes")
        return ListenAddress(path=path)
    parts = _TCP.fullmatch(text)
    host = "" if parts is None else (parts["six"] or parts["four"]).replace("localhost", "127.0.0.1")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        parts = None
    if parts is None or int(parts["port"]) > MOST_PORT:
        raise ValueError("is not an address such as 127.0.0.1:9099, [::1]:9099 or unix:/run/trimsfs/metrics.sock")
    return ListenAddress(host=host, port=int(parts["port"]))
