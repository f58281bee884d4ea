"""Read moderation: few reads of a slow stream, all bytes, and no time lost."""

import socket
import threading
import time

import pytest

from trimsfs.concurrency import read_moderation
from trimsfs.concurrency.read_moderation import SETTLED_S, WAITED_S, ReadModeration

PACKET, PACKETS, INTERVAL_S = 1448, 500, 0.003


def _send(stream: socket.socket, took: list[float]) -> None:
    begun = time.monotonic()
    for number in range(PACKETS):
        time.sleep(max(0.0, begun + number * INTERVAL_S - time.monotonic()))
        stream.sendall(bytes(PACKET))
    took.append(time.monotonic() - begun)


def _receive(stream: socket.socket) -> tuple[int, float]:
    """How many reads a whole stream takes, and how long."""
    reads, left, begun = 0, PACKETS * PACKET, time.monotonic()
    moderation = ReadModeration(left)
    while left:
        began = time.monotonic()
        count = len(stream.recv(1 << 18))
        assert count
        reads, left = reads + 1, left - count
        moderation.pause(count, waited=time.monotonic() - began >= WAITED_S)
    return reads, time.monotonic() - begun


def test_a_slow_stream_wakes_its_reader_rarely_and_takes_no_longer() -> None:
    took: list[float] = []
    sends, receives = socket.socketpair()
    with sends, receives:
        sender = threading.Thread(target=_send, args=(sends, took))
        sender.start()
        reads, received_s = _receive(receives)
        sender.join()
    assert reads < PACKETS / 3
    assert received_s < took[0] * 1.2


class Clock:
    """A clock of its own; ``slept`` are the pauses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


def _pauses(monkeypatch: pytest.MonkeyPatch, length: int, count: int, read_s: float, reads: int) -> list[float]:
    """The pauses after reads of *count* bytes, each of which takes so long."""
    clock = Clock()
    monkeypatch.setattr(read_moderation, "time", clock)
    moderation = ReadModeration(length)
    for _ in range(reads):
        clock.now += read_s
        moderation.pause(count, waited=read_s >= WAITED_S)
    return clock.slept


@pytest.mark.parametrize(
    ("count", "read_s", "pause_s"),
    [
        pytest.param(1 << 14, 0.0001, None, id="bytes are there"),
        pytest.param(1 << 18, 0.002, None, id="fast"),
        pytest.param(1 << 14, 0.002, 0.004, id="as long as 32 KiB take"),
        pytest.param(1 << 10, 0.05, 0.05, id="at most"),
    ],
)
def test_a_reader_pauses_only_when_it_had_to_wait(
    monkeypatch: pytest.MonkeyPatch, count: int, read_s: float, pause_s: float | None
) -> None:
    reads = round(SETTLED_S / read_s) + 3
    pauses = _pauses(monkeypatch, 1 << 40, count, read_s, reads)
    assert pauses[:1] == ([] if pause_s is None else [pytest.approx(pause_s, rel=0.1)])


@pytest.mark.parametrize("first_s", [0.0, 1.0])
def test_a_stream_that_has_just_begun_is_not_paused(monkeypatch: pytest.MonkeyPatch, first_s: float) -> None:
    """Neither the time to its first bytes nor the slow start of its sender tell the rate of the link."""
    clock = Clock()
    monkeypatch.setattr(read_moderation, "time", clock)
    moderation = ReadModeration(1 << 30)
    for read_s in (first_s, 0.02, 0.02, 0.02):
        clock.now += read_s
        moderation.pause(1448, waited=read_s >= WAITED_S)
    assert clock.slept == []


def test_the_last_bytes_are_not_waited_for_longer_than_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = _pauses(monkeypatch, 41 * 1000 + 500, 1000, 0.01, 41)
    assert pauses[-1] < pauses[-2] / 2
