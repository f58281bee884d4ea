"""A server that stops while what has come is announced."""

import threading

import trio
import trio.lowlevel

from tests.support.parts import until
from tests.support.served import Serving
from tests.support.stores import MemoryStore


def test_a_server_that_stops_while_it_asks_what_is_signed_ends(
    serving: Serving, store: MemoryStore, files: dict[str, bytes]
) -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            async with (
                serving(backing=None) as server,
                server.disk.using(store.generation("signed/params")) as blob,
            ):
                gate = store.block(method="list_page", key="signed/")
                await server.fetcher.fetch_all(blob)  # as for a sibling, or warm
                await until(lambda: gate.statistics().tasks_waiting > 0)

                @trio.lowlevel.spawn_system_task
                async def later() -> None:
                    await trio.sleep(0.3)
                    gate.set()

                scope.cancel()
                await trio.lowlevel.checkpoint()

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the server does not end"
