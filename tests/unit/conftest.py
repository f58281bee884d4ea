"""Fixtures of the unit tests."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.served import FakeBacking, Server, Serving, served
from tests.support.stores import MemoryStore
from tests.unit.workshop import Workshop
from trimsfs.handover.ledger import Ledger


@pytest.fixture
async def workshop(tmp_path: Path, chunk_size: int) -> AsyncIterator[Workshop]:
    """For a store that tells only at the end of a read whether its bytes are right."""
    async with working(tmp_path / "cache", chunk_size, MemoryStore()) as workshop:
        yield workshop


@pytest.fixture
async def streaming(tmp_path: Path, chunk_size: int) -> AsyncIterator[Workshop]:
    """For a store whose bytes are right at once."""
    async with working(tmp_path / "cache", chunk_size, MemoryStore(streaming=True)) as workshop:
        yield workshop


@pytest.fixture
def backing() -> FakeBacking:
    """What passes opens through."""
    return FakeBacking()


@pytest.fixture
def ledger() -> Iterator[Callable[[], Ledger]]:
    """Opens the ledger that one server after the other goes on with."""
    memory = os.memfd_create("ledger")
    yield lambda: Ledger(os.dup(memory))
    os.close(memory)


@pytest.fixture
def serving(store: MemoryStore, tmp_path: Path, chunk_size: int) -> Serving:
    """Starts a server on the store; always with the same cache."""
    return partial(served, store=store, directory=tmp_path / "cache", chunk_size=chunk_size)


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    """A server on the store of the test's module."""
    async with serving() as server:
        yield server


@asynccontextmanager
async def working(directory: Path, chunk_size: int, store: MemoryStore) -> AsyncIterator[Workshop]:
    async with trio.open_nursery() as nursery:
        workshop = Workshop(nursery, directory, chunk_size, store)
        yield workshop
        store.heal()
        nursery.cancel_scope.cancel()
    if workshop.tier is not None:
        await workshop.tier.aclose()
