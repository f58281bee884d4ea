"""A server that stops while what has come is announced."""

import threading

import trio
import trio.lowlevel

from tests.support.held import reached
from tests.unit.signature_policy.common import PARAMS, Scene


def test_a_server_that_stops_while_it_asks_what_is_signed_ends(scene: Scene) -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            async with (
                scene.serving(backing=None) as server,
                server.disk.blobs.using(scene.store.generation(PARAMS)) as blob,
            ):
                gate = scene.store.block(method="list_page", key="signed/")
                await server.fetcher.fetch_all(blob)  # as for a sibling, or warm
                await reached(gate)

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
