"""What a keeper keeps of one mount while servers come and go, and what it does for the server that serves."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mountctl.keeper import limits
from mountctl.keeper.descriptor_store import DescriptorStore
from mountctl.keeper.fuse_connection import STORED, Connection
from mountctl.keeper.phase import Phase
from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.keeper.servers.server_source import Order
from mountctl.linux.sd_notify import Notifier


class KeptMount:
    """The descriptors of one mount, and what the service manager stores of them; *stored* are those of an earlier
    keeper, by name. Raises AlreadyKeptError."""

    def __init__(self, order: Order, stored: Mapping[str, int]) -> None:
        self.mountpoint = Path(order["mountpoint"])
        self.connection = Connection.of(order, stored)
        self.service_manager = Notifier(os.environ)
        self._stored = False
        self.descriptor_store = DescriptorStore(self.mountpoint, self.service_manager, stored)
        self.phase = Phase.REPLACEABLE if self.connection.mounted else Phase.STARTING
        self.left = False
        """Whether the keeper leaves it mounted at the end: a server serves on."""
        self.exit_code = 0
        """That of the keeper, once it ends."""

    @property
    def ended(self) -> bool:
        return self.phase is Phase.ENDING

    def end(self, exit_code: int) -> None:
        """Let the keeper end; the first exit code counts."""
        if not self.ended:
            self.phase, self.exit_code = Phase.ENDING, exit_code

    def notice_unmount(self) -> None:
        """See whether somebody has unmounted it, or aborted its connection."""
        if not (self.phase.unmounted or self.ended) and self.connection.mounted and self.connection.gone:
            self.phase = Phase.UNMOUNTED

    def answer(self, server: ServerProcess, message: server_messages.Message, descriptors: list[int]) -> None:
        """Do what the server that serves asks for. Removes descriptors that it keeps from *descriptors*.

        Raises ProtocolError.
        """
        connection = self.connection
        match message:
            case server_messages.Mount() if not connection.mounted and descriptors:
                answer = connection.mount(descriptors.pop())
                server.send(answer, [connection.for_server()["fuse"]] if connection.mounted else [])
            case server_messages.BackingOpen() if connection.mounted:
                answers = connection.open_backings(descriptors, message.count or 1)
                server.unclaimed = [answer["id"] for answer in answers if "id" in answer]
                server.send({"answers": answers} if message.count else answers[0])
            case server_messages.BackingClose() if connection.mounted:
                connection.close_backing(message.number)
            case server_messages.Hold() | server_messages.LetGo() | server_messages.Recall() | server_messages.Listen():
                self.descriptor_store.answer(message, descriptors, server.send)
            case _:
                raise server_messages.ProtocolError(f"{type(message).__name__} out of order")

    def for_next_keeper(self) -> dict[str, int]:
        """The descriptors that the next keeper needs, by name."""
        return self.connection.for_server() | self.descriptor_store.listener()

    def store(self, order: Order, *, changed: bool) -> None:
        """Let the service manager store what the next keeper needs: once, and the order again when it has *changed*.

        If this keeper is killed before the new order is stored, `mountctl run` makes one from the declaration.
        """
        if self._stored and not changed:
            return
        identity = self.connection.identity
        known = {"identity": asdict(identity)} if identity is not None else {}
        descriptors = self.connection.stored(json.dumps(order | known).encode())
        if self._stored or self.connection.inherited:
            self.service_manager.unstore(("order",))  # of the other descriptors, the manager keeps one each
        self.service_manager.store({"order": descriptors["order"]} if self._stored else descriptors)
        self._stored = True
        self.descriptor_store.store()

    def close(self, server: ServerProcess | None) -> None:
        """End the server, if there is one, and unmount."""
        self.service_manager.unstore(STORED)
        self.descriptor_store.close()
        if server is not None:
            server.channel.close()  # the keeper answers it no more
            if not self.connection.mounted:
                server.terminate()  # it does not end by itself
            if not server.wait(limits.STOP_TIMEOUT_S):
                # One of its threads may wait in the kernel for an answer of the server itself.
                self.connection.abort()
                server.kill()
                server.wait(limits.STOP_TIMEOUT_S)
        self.connection.close()

    def remove_devices(self, reporter: Reporter) -> None:
        """Remove the CDI spec of the mount, which has ended."""
        try:
            from mountctl.linux.cdi_specs import remove  # noqa: PLC0415 - only now: it takes memory

            remove(self.mountpoint)
        except Exception as error:  # the programs may have been replaced or removed since this one began
            reporter.warning(f"the CDI devices of {self.mountpoint} are not removed: {error}")
