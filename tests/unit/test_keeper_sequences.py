"""A keeper that hears anything, with any descriptors: it does what its protocol says, or ends the server."""

import gc
import json
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mountctl.keeper.descriptor_store import HELD_LIMIT
from mountctl.keeper.keeper import Keeper
from mountctl.keeper.phase import Phase
from mountctl.keeper.servers import server_messages
from tests.support.keeper_in_process import DESCRIPTORS, FakeServer, keeper_in_process
from tests.support.messages import near_misses

TURN = [b'{"type": "standing-by", "ledger": "2"}', b'{"type": "mount"}', b'{"type": "ready", "resends": true}']
numbers = st.sampled_from([1, 2, 3, 7, (1 << 31) - 1])
right = (
    st.sampled_from(["mount", "backing-open", "listen", "alive"]).map(lambda kind: {"type": kind})
    | st.builds(
        lambda kind, number: {"type": kind, "number": number}, st.sampled_from(["hold", "let-go", "recall"]), numbers
    )
    | st.integers(1, 3).map(lambda count: {"type": "backing-open", "count": count})
    | numbers.map(lambda number: {"type": "backing-close", "id": number})
    | st.booleans().map(lambda resends: {"type": "ready", "resends": resends})
    | st.text(max_size=20).map(lambda text: {"type": "failed", "kind": "StoreError", "error": text})
)
messages = (
    right.map(lambda message: json.dumps(message).encode())
    | near_misses.map(lambda message: json.dumps(message).encode())
    | st.binary(min_size=1, max_size=64)
    | st.just(b"x" * 9000)
)
said = st.tuples(messages, st.lists(st.sampled_from(sorted(DESCRIPTORS)), max_size=2))


@pytest.fixture(scope="module", autouse=True)
def only_new_garbage() -> Iterator[None]:
    """What other tests have imported and left is collected once, not before each example."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def hear(made: Keeper, server: FakeServer, data: bytes, kinds: list[str]) -> None:
    """Say something, and have the keeper act on it; answers are heard now and then only."""
    server.say(data, kinds)
    made._crew.dispatcher.receive(server)
    if server.standing_by:
        made._crew.promote(server)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@given(st.lists(said, max_size=25), st.booleans())
@settings(deadline=None, max_examples=100)
def test_anything_is_done_or_ends_the_server(words: list[tuple[bytes, list[str]]], has_turn: bool) -> None:
    gc.collect()  # or garbage of the example before goes meanwhile
    before = descriptors()
    done: list[str] = []
    with keeper_in_process(done) as (made, server):
        for data in TURN if has_turn else []:
            hear(made, server, data, ["device"] if data == TURN[1] else [])
        assert not server.kills
        idle = descriptors()
        for data, kinds in words:
            hear(made, server, data, kinds)
            if server.kills:  # nothing more of it is heard
                break
            assert len(data) <= server_messages.MESSAGE_LIMIT
            assert made._mount.phase is not Phase.ENDING
        assert done.count("mount") <= 1
        # What is held, the connection, the lock, two listeners.
        assert descriptors() <= idle + len(made._mount.descriptor_store._descriptors) + 4
        assert len(made._mount.descriptor_store._descriptors) <= HELD_LIMIT
    assert descriptors() == before


def test_a_failure_of_the_server_that_serves_is_none_of_the_one_that_replaces_it() -> None:
    replies: list[dict[str, object]] = []
    with keeper_in_process([]) as (made, server):
        for data in TURN:
            hear(made, server, data, ["device"] if data == TURN[1] else [])
        assert made._crew.replacement.begin(dict(made._crew.replacement.order), replies.append)
        hear(made, server, b'{"type": "failed", "kind": "CacheError", "error": "the disk has failed"}', [])
        assert (made._crew.replacement.under_way, replies) == (True, [])


def test_a_mount_that_starts_does_not_end_with_a_standby_that_its_server_could_not_fork() -> None:
    with keeper_in_process([]) as (made, server):
        hear(made, server, TURN[0], [])
        standby = made._crew.standby = FakeServer()
        made._selector.register(standby.channel, 1)
        failed = server_messages.Failed("CacheError", "no room")
        made._crew._on_message(standby, failed, [])
        assert not made._reporter._reported
        standby.ended_with = 1
        made._crew.on_end(standby)
        standby.end.close()
        assert (made._crew.active is server, made._mount.phase) == (True, Phase.STARTING)


def test_a_server_that_has_closed_its_channel_says_nothing() -> None:
    with keeper_in_process([]) as (_, server):
        assert not server.has_message()
        server.say(TURN[0])
        assert server.has_message()
        assert server.receive()[0] is not None
        server.end.close()
        assert not server.has_message()
