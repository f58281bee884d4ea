"""Where a keeper's servers come from: it starts them itself, or launchers elsewhere do."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from mountctl.keeper.control_socket import Reply
from mountctl.keeper.servers.server_process import ServerProcess

Order = dict[str, Any]


class ServerSource(Protocol):
    """A source of servers. The order of a server tells what has started it."""

    elsewhere: bool
    """Whether servers are started elsewhere, as in other containers. These outlive the keeper, whose mount they keep
    for the next one."""

    @property
    def leave(self) -> bool:
        """Whether the keeper is to leave its mount to the next one."""
        ...

    def newcomers(self) -> Iterable[tuple[Order, Reply]]:
        """The orders whose servers are to replace the present one, and whom to tell the outcome."""
        ...

    def can_start(self, order: Order) -> bool:
        """Whether there is still anything to start servers with this order."""
        ...

    def start(self, order: Order, *, spare: bool, alone: bool) -> ServerProcess:
        """Start a server; *spare* and *alone* as in `ServerProcess`. Raises OSError."""
        ...

    def another(self) -> Order | None:
        """An order with which servers can start when none can with the present one."""
        ...

    def problem(self, order: Order) -> str | None:
        """Why the launcher of this order starts no server for now; ask once a tick."""
        ...

    def keep(self, server: ServerProcess | None, descriptors: Mapping[str, int]) -> None:
        """Tell that this server is ready, or that none serves.

        What the server comes from keeps copies of these descriptors, by name, for the next keeper. Nothing else keeps
        any.
        """
        ...

    def refuse(self, server: ServerProcess, kind: str, error: str) -> str:
        """Tell that this server cannot serve, while no other does; the error, for whoever has it mounted.

        A launcher that hears this ends: it can start no more servers, and whoever restarts it tries again.
        """
        ...


class OwnServers:
    """Servers that the keeper starts itself, as its children: it goes on trying, and they end with it."""

    elsewhere = False
    leave = False

    def newcomers(self) -> Iterable[tuple[Order, Reply]]:
        return ()

    def can_start(self, order: Order) -> bool:
        return True

    def start(self, order: Order, *, spare: bool, alone: bool) -> ServerProcess:
        return ServerProcess(order, spare=spare, alone=alone)

    def another(self) -> Order | None:
        return None

    def problem(self, order: Order) -> str | None:
        return None

    def keep(self, server: ServerProcess | None, descriptors: Mapping[str, int]) -> None:
        """Nothing else has them: a service manager may, see `KeptMount.store`."""

    def refuse(self, server: ServerProcess, kind: str, error: str) -> str:
        return error  # nobody restarts it but the keeper, which counts this as a crash
