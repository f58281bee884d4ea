"""Read moderation: few reads of a slow stream, all bytes, and no time lost."""

import socket
import threading
import time

import pytest

from trimsfs.concurrency import read_moderation
from trimsfs.concurrency.read_moderation import ReadModeration

PACKET, PACKETS, INTERVAL_S = 1448, 500, 0.002


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
        moderation.begins()
        count = len(stream.recv(1 << 18))
        assert count
        reads, left = reads + 1, left - count
        moderation.received(count)
    return reads, time.monotonic() - begun


def test_a_slow_stream_wakes_its_reader_rarely_and_takes_no_longer() -> None:
    took: list[float] = []
    sends, receives = socket.socketpair()
    with sends, receives:
        sender = threading.Thread(target=_send, args=(sends, took))
        sender.start()
        reads, received_s = _receive(receives)
        sender.join()
    assert reads < PACKETS / 8
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


@pytest.mark.parametrize(
    ("count", "read_s", "pauses"),
    [
        pytest.param(1 << 14, 0.0001, [], id="bytes are there"),
        pytest.param(1 << 18, 0.002, [], id="fast"),
        pytest.param(1 << 14, 0.001, [0.004], id="as long as 64 KiB take"),
        pytest.param(1 << 10, 0.1, [0.1], id="at most"),
    ],
)
def test_a_reader_pauses_only_when_it_had_to_wait(
    monkeypatch: pytest.MonkeyPatch, count: int, read_s: float, pauses: list[float]
) -> None:
    clock = Clock()
    monkeypatch.setattr(read_moderation, "time", clock)
    moderation = ReadModeration(1 << 30)
    moderation.begins()
    clock.now += read_s
    moderation.received(count)
    assert clock.slept == pytest.approx(pauses)


def test_the_last_bytes_are_not_waited_for_longer_than_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(read_moderation, "time", clock)
    moderation = ReadModeration((1 << 14) + (1 << 13))
    for count in (1 << 14, 1 << 13):
        moderation.begins()
        clock.now += 0.01
        moderation.received(count)
    assert clock.slept == pytest.approx([0.005])
