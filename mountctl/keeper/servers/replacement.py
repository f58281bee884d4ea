"""Replaces a server while the file system is mounted, with the same order or with the operator's new one."""

from dataclasses import dataclass
from typing import Any

from mountctl.keeper.control_socket import Reply
from mountctl.keeper.servers.server_process import ServerProcess

FIXED = ("mountpoint", "source", "allow_other", "foreground")
"""The fields of an order that cannot change while it is mounted; the cache directory cannot either."""


@dataclass(slots=True)
class _Request:
    """An operator's request. ``before`` is the order to return to if the new server fails, ``outgoing`` the old server
    once the keeper has killed it."""

    reply: Reply
    before: dict[str, Any]
    outgoing: ServerProcess | None = None


class Replacement:
    """The order that servers are started with, and the operator's request to replace the server, if there is one.

    The keeper kills the old server only when one with the new order stands by. The operator gets a reply once the new
    one serves, or has failed.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        """What servers are started with. A server is up to date if its order is this very object."""
        self._request: _Request | None = None

    @property
    def under_way(self) -> bool:
        return self._request is not None

    @property
    def outgoing(self) -> ServerProcess | None:
        """The server that the keeper killed for the new one, if it did."""
        return self._request.outgoing if self._request is not None else None

    def begin(self, order: Any, reply: Reply) -> bool:
        """Begin to replace the server by one with this order; False, after a reply that says why, if refused."""
        if self._request is not None:
            reply({"error": "the server is being replaced already"})
            return False
        refused = _refusal(self.order, order)
        if refused is not None:
            reply(refused)
            return False
        self._request = _Request(reply, self.order)
        self.order = dict(order)  # a new object, even if it is equal
        return True

    def awaits(self, server: ServerProcess) -> bool:
        """Whether this is the new server of the request."""
        return self._request is not None and server.order is self.order

    def kill_outgoing(self, server: ServerProcess) -> None:
        """Kill the old server: the new one stands by."""
        assert self._request is not None
        self._request.outgoing = server
        server.kill()  # the new one takes over whatever it leaves

    def complete(self, server: ServerProcess) -> bool:
        """Note that a server is ready; if it is the new one, tell the operator and return True."""
        if self._request is None or not self.awaits(server):
            return False
        self._request.reply({"server_pid": server.pid})
        self._request = None
        return True

    def fail(self, error: str, kind: str = "TakeoverError") -> None:
        """Note that the new server failed, if one was requested: tell the operator, and return to the order before."""
        if self._request is not None:
            self.order = self._request.before
            self._request.reply({"error": error, "kind": kind})
            self._request = None


def _refusal(before: dict[str, Any], order: Any) -> dict[str, Any] | None:
    """The reply to an order that cannot replace the one before; None if it can."""
    match order:
        case {"server": [str(), *_], "options": {"cache_dir": str(), "log_file": str()}}:
            pass
        case _:
            return {"error": "not an order"}
    changed = [name for name in FIXED if order.get(name) != before[name]]
    if order["options"]["cache_dir"] != before["options"]["cache_dir"]:
        changed.append("cache_dir")
    if not changed:
        return None
    names = ", ".join(changed).replace("source", "store")
    error = f"{names} cannot be changed while it is mounted: run `mountctl down` and `mountctl up`"
    return {"error": error, "kind": "ConfigurationError"}
