"""What the servers of a mount are started with, and what that may become while the file system is mounted."""

from dataclasses import dataclass
from typing import Any

from mountctl.keeper.control_socket import Reply
from mountctl.keeper.server_process import Server

FIXED = ("mountpoint", "source", "allow_other", "foreground")
"""What cannot be changed while it is mounted, beside the cache directory."""


@dataclass(slots=True)
class _Replacement:
    """The operator's order to replace the server; ``before`` is what to go back to when that fails, and ``outgoing``
    the server that has been killed for it."""

    reply: Reply
    before: dict[str, Any]
    outgoing: Server | None = None


class Orders:
    """The order of now, and its replacement by an operator's: once a server of the new one stands by, the old server
    ends. The operator is told when the new one goes on, or that it does not come."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.now = order
        """What servers are started with; each has the very order that it was started with."""
        self._replacement: _Replacement | None = None

    @property
    def replacing(self) -> bool:
        """Whether a server is being replaced."""
        return self._replacement is not None

    @property
    def outgoing(self) -> Server | None:
        """The server that has been killed to make way, if one has."""
        return self._replacement.outgoing if self._replacement is not None else None

    def replace(self, given: Any, reply: Reply) -> bool:
        """Go over to what an operator has given, unless something speaks against it; whether it goes over."""
        if self._replacement is not None:
            reply({"error": "the server is being replaced already"})
            return False
        refused = _refusal(self.now, given)
        if refused is not None:
            reply(refused)
            return False
        self._replacement = _Replacement(reply, self.now)
        self.now = dict(given)  # it can be told from the one of before
        return True

    def awaits(self, server: Server) -> bool:
        """Whether this is the server that is to take the place of another."""
        return self._replacement is not None and server.order is self.now

    def oust(self, server: Server) -> None:
        """Have a server make way: the new one stands by."""
        assert self._replacement is not None
        self._replacement.outgoing = server
        server.kill()  # its successor goes on from wherever it is

    def fulfilled(self, server: Server) -> bool:
        """A server is ready; whether it is the one that was ordered, which the operator is told then."""
        if self._replacement is None or not self.awaits(server):
            return False
        self._replacement.reply({"server_pid": server.pid})
        self._replacement = None
        return True

    def revoke(self, error: str) -> None:
        """The new server does not come: the old one stays, or another like it goes on."""
        if self._replacement is not None:
            self.now = self._replacement.before
            self._replacement.reply({"error": error})
            self._replacement = None


def _refusal(before: dict[str, Any], given: Any) -> dict[str, Any] | None:
    """Why what an operator has given cannot take the place of the order of before, if it cannot."""
    match given:
        case {"server": [str(), *_], "options": {"cache_dir": str(), "log_file": str()}}:
            pass
        case _:
            return {"error": "not an order"}
    changed = [name for name in FIXED if given.get(name) != before[name]]
    if given["options"]["cache_dir"] != before["options"]["cache_dir"]:
        changed.append("cache_dir")
    if not changed:
        return None
    names = ", ".join(changed).replace("source", "store")
    error = f"{names} cannot be changed while it is mounted: take it down, and up again"
    return {"error": error, "kind": "ConfigurationError"}
