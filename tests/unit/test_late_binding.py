"""Calls to components that are built later: a server with one that leads nowhere does not start."""

import pytest

from tests.support.served import Serving
from tests.support.stores import MemoryStore
from trimsfs.server import assembly
from trimsfs.server.late_binding import LateBound


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


async def test_a_server_with_a_call_that_is_not_bound_does_not_start(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithOneMore(assembly.Calls):
        def __init__(self) -> None:
            super().__init__()
            LateBound[[], None](self, "forgotten")

    monkeypatch.setattr(assembly, "Calls", WithOneMore)
    with pytest.raises(RuntimeError, match="not bound: forgotten"):
        async with serving():
            pass
