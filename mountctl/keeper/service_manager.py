"""Tells the service manager the keeper's state, and stores there what the next keeper of the mount needs."""

import json
import os
from dataclasses import asdict
from typing import Any

from mountctl.keeper.fuse_connection import STORED, Connection
from mountctl.linux.sd_notify import Notifier


class ServiceManager:
    """Keeps a service manager, if there is one, informed about one mount of a *source*."""

    def __init__(self, notifier: Notifier, source: str) -> None:
        self._notifier = notifier
        self._source = source
        self._stored = False

    def ready(self) -> None:
        """Report that a server is ready."""
        self._notifier.tell("READY=1", f"STATUS=serving {self._source}", f"MAINPID={os.getpid()}")

    def alive(self) -> None:
        """Report that the keeper's loop runs and has a server."""
        self._notifier.alive()

    def stopping(self) -> None:
        """Report that the keeper is ending."""
        self._notifier.tell("STOPPING=1")

    def gave_up(self) -> None:
        """Report that the keeper starts no more servers."""
        self._notifier.tell("STATUS=servers keep crashing: gave up")

    @property
    def stored(self) -> bool:
        """Whether the manager has what the next keeper needs."""
        return self._stored

    def store(self, connection: Connection, order: dict[str, Any]) -> None:
        """Let the manager store the descriptors and the order that the next keeper needs; later, only the new order.

        If this keeper is killed before the new order is stored, `mountctl run` makes one from the declaration.
        """
        identity = connection.identity
        known = {"identity": asdict(identity)} if identity is not None else {}
        descriptors = connection.stored(json.dumps(order | known).encode())
        if self._stored or connection.inherited:
            self._notifier.unstore(("order",))  # of the other descriptors, the manager keeps one each
        if self._stored:
            descriptors = {"order": descriptors["order"]}
        self._notifier.store(descriptors)
        self._stored = True

    def unstore(self) -> None:
        """Let the manager close what it has stored, as the mount ends."""
        self._notifier.unstore(STORED)
