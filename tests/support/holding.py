"""A server that has its keeper hold a pipe, for tests: in an order's ``server``, in place of ``trimsfs.daemon``.

The first of a mount has one held in which it has left a word. Each gives who connects its process id and the pipe.
"""

import array
import os
import socket

import trio

from trimsfs.handover.keeper_client import KeeperClient
from trimsfs.server import lifecycle, startup

NUMBER = 7


class Holding(KeeperClient):
    """Asks its keeper for what servers with GPU copies will."""

    async def run(self) -> None:
        pipe = await self.recall(NUMBER)
        if pipe is None:
            pipe, write = os.pipe()
            os.write(write, f"of server {os.getpid()}".encode())
            os.close(write)
            assert await self.hold(NUMBER, pipe)
        found = await self.listen()
        assert found is not None
        listener = trio.socket.from_stdlib_socket(socket.socket(fileno=found[1]))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run)
            while True:
                end, _ = await listener.accept()
                with end:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pipe]))]
                    await end.sendmsg([str(os.getpid()).encode()], rights)


if __name__ == "__main__":
    vars(lifecycle)["KeeperClient"] = Holding
    startup.main()
