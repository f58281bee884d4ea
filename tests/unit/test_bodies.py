"""Bodies of a store's answers: which of them count as stalled."""

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import trio

from trimsfs.errors import StoreSlowError, StoreStalledError, StoreUnavailableError
from trimsfs.extras.stores.cloud import gcs
from trimsfs.extras.stores.huggingface.hub_store import HubStore
from trimsfs.extras.stores.oci.registry import registry_errors
from trimsfs.options import MountOptions
from trimsfs.stores.http import bodies, receive_loop
from trimsfs.stores.http.bodies import (
    MOST_PATIENCE,
    MOST_SLOW_INTERVALS,
    PATIENCE_S,
    SLOWEST_RATE,
    RequestThreads,
    Translate,
    pass_on,
)
from trimsfs.stores.http.failures import parsing
from trimsfs.stores.http.receive_loop import PIECE
from trimsfs.stores.s3 import s3_errors

STALL_S, SECONDS = 5, 12


class Body:
    """The part of a body that is the same for all here."""

    most = PIECE

    def ready(self) -> bool:
        return True

    def close(self) -> None: ...


class Link:
    """Brings each of some bodies so many bytes a second, all in step, by a clock of its own.

    Within a second, their threads run in any order: one may be judged before the others count what they got in it.
    """

    def __init__(self, rates: Sequence[int]) -> None:
        self.rates = rates
        self.stalled: set[int] = set()
        self._now = 0.0
        self._second = threading.Barrier(len(rates), self._tick)

    def monotonic(self) -> float:
        return self._now

    def _tick(self) -> None:
        self._now += 1

    def run(self) -> set[int]:
        """Pass all bodies on; the numbers of those that stalled."""
        threads = [threading.Thread(target=self._pass_on, args=(number,)) for number in range(len(self.rates))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.stalled

    def _pass_on(self, number: int) -> None:
        body = _Body(self.rates[number], self._second)
        try:
            pass_on(body, SECONDS * self.rates[number], lambda _: None, stall_timeout_s=STALL_S)
        except StoreStalledError:
            self.stalled.add(number)
            for _ in range(SECONDS - body.seconds):
                self._second.wait(10)  # the clock goes on for the others


class _Body(Body):
    def __init__(self, rate: int, second: threading.Barrier) -> None:
        self.seconds = 0
        self._rate = rate
        self._second = second

    def readinto1(self, _buffer: memoryview, /) -> int:
        self._second.wait(10)
        self.seconds += 1
        return self._rate


@pytest.mark.parametrize(
    ("rates", "stalled"),
    [
        pytest.param([SLOWEST_RATE - 1], {0}, id="alone"),
        pytest.param([SLOWEST_RATE + 1], set(), id="alone and faster"),
        pytest.param([SLOWEST_RATE // 4] * 16, set(), id="many on a slow link"),
        pytest.param([SLOWEST_RATE // 4] * 15 + [SLOWEST_RATE // 24], {15}, id="one of many"),
        pytest.param([SLOWEST_RATE // 4] * 3, {0, 1, 2}, id="all of few"),
        pytest.param([200_000] * 4 + [SLOWEST_RATE // 2], {4}, id="one beside fast ones"),
    ],
)
def test_a_body_stalls_by_what_others_get(
    monkeypatch: pytest.MonkeyPatch, rates: Sequence[int], stalled: set[int]
) -> None:
    link = Link(rates)
    for module in (bodies, receive_loop):
        monkeypatch.setattr(module, "time", link)
    monkeypatch.setattr(bodies, "_link", bodies._Link())
    assert link.run() == stalled


class Attempts(Body):
    """Bodies one after the other, each at a rate of its own, by a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self._rate = 0

    def monotonic(self) -> float:
        return self.now

    def readinto1(self, buffer: memoryview, /) -> int:
        self.now += 1
        return min(self._rate, len(buffer))

    def at(self, rate: int, *, seconds: int = SECONDS) -> type[Exception] | None:
        """The error of a body that brings so many bytes a second for so long; None if it is passed on."""
        self._rate = rate
        try:
            pass_on(self, seconds * rate, lambda _: None, stall_timeout_s=STALL_S)
        except StoreStalledError as error:
            return type(error)
        return None


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Attempts in a process that has received nothing before."""
    attempts = Attempts()
    for module in (bodies, receive_loop):
        monkeypatch.setattr(module, "time", attempts)
    monkeypatch.setattr(bodies, "_link", bodies._Link())
    return attempts


def test_a_link_that_stays_slow_is_borne(attempts: Attempts) -> None:
    rate = SLOWEST_RATE // MOST_PATIENCE + 1
    assert [attempts.at(rate) for _ in range(5)] == [StoreSlowError, *[None] * 4]


def test_a_body_that_stays_slow_ends_as_the_link_may_be_fast_again(attempts: Attempts) -> None:
    rate = SLOWEST_RATE // 2
    assert attempts.at(rate) is StoreSlowError
    began = attempts.now
    assert attempts.at(rate, seconds=1000) is StoreSlowError
    assert attempts.now - began <= (MOST_SLOW_INTERVALS + 1) * (STALL_S + 1)
    assert attempts.at(10 * SLOWEST_RATE, seconds=1000) is None


def test_a_link_that_was_slow_long_ago_is_not_borne(attempts: Attempts) -> None:
    rate = SLOWEST_RATE // 2 + 1
    assert [attempts.at(rate) for _ in range(2)] == [StoreSlowError, None]
    attempts.now += PATIENCE_S + 1
    assert attempts.at(rate) is StoreSlowError


def test_a_drip_is_never_borne(attempts: Attempts) -> None:
    assert [attempts.at(SLOWEST_RATE // MOST_PATIENCE // 2) for _ in range(8)] == [StoreStalledError] * 8


class Hanging(Body):
    """A body whose client reads on and on without a piece, as of chunks that never begin, until it is ``released``."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def readinto1(self, _buffer: memoryview, /) -> int:
        self.released.wait(20)
        return 0


def request_threads(stall_timeout_s: float) -> RequestThreads:
    """Those of a store whose requests raise StoreErrors alone."""
    return RequestThreads("the store", lambda function, _: function(), max_requests=1, stall_timeout_s=stall_timeout_s)


async def test_a_body_of_which_the_client_returns_nothing_is_abandoned() -> None:
    threads, body = request_threads(0.25), Hanging()
    try:
        with (
            trio.fail_after(10),
            pytest.raises(StoreStalledError, match=r"the store: no complete answer in \d+(\.\d+)? s"),
        ):
            await threads.read(lambda: (body, None), 2 * PIECE, lambda _: None, "")
    finally:
        body.released.set()


class Steady(Body):
    """A body that brings a few bytes every 20 ms."""

    def __init__(self, piece: int) -> None:
        self._piece = piece

    def readinto1(self, _buffer: memoryview, /) -> int:
        time.sleep(0.02)
        return self._piece


async def test_a_body_on_a_link_that_many_share_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 60 * PIECE
    monkeypatch.setattr(bodies, "SLOWEST_RATE", 5 * length)
    monkeypatch.setattr(bodies, "MOST_PATIENCE", 40)
    monkeypatch.setattr(bodies, "LONGEST_SILENCE", 100)
    monkeypatch.setattr(bodies._Link, "least_rate", lambda _link, _rate: 1.0)
    threads, came = request_threads(0.1), bytearray()
    bound_s = MOST_SLOW_INTERVALS * 0.1 + 0.2
    began = time.monotonic()
    with trio.fail_after(10):
        await threads.read(lambda: (Steady(PIECE), None), length, came.extend, "")
    assert len(came) == length
    assert time.monotonic() - began > 1.5 * bound_s


class Stalling(Body):
    """A body of which a part comes, by the clock of `Attempts`, and then nothing."""

    def __init__(self, clock: Attempts, seconds: int, rate: int) -> None:
        self._clock = clock
        self._seconds = seconds
        self._rate = rate

    def readinto1(self, _buffer: memoryview, /) -> int:
        self._clock.now += 1
        self._seconds -= 1
        if self._seconds < 0:
            raise StoreStalledError("no bytes")
        return self._rate


@pytest.mark.parametrize(
    ("seconds", "rate", "error"),
    [
        pytest.param(30, SLOWEST_RATE, StoreSlowError, id="after many bytes"),
        pytest.param(1, 100, StoreStalledError, id="after few"),
        pytest.param(0, 100, StoreStalledError, id="at once"),
    ],
)
async def test_a_body_that_stalls_after_many_bytes_is_an_answer(
    attempts: Attempts, seconds: int, rate: int, error: type[Exception]
) -> None:
    threads = request_threads(STALL_S)
    body = Stalling(attempts, seconds, rate)
    with pytest.raises(StoreStalledError, match="no bytes") as raised:
        await threads.read(lambda: (body, None), 60 * SLOWEST_RATE, lambda _: None, "")
    assert raised.type is error


def _translations() -> Iterator[Translate]:
    """What stores call around their requests."""
    options = MountOptions(anonymous=True)
    yield lambda function, key: s3_errors.translated(function, "models", key)
    yield HubStore("hf://org/m", options, max_requests=1)._translated
    yield registry_errors
    yield gcs.open_bucket("gs://models", options, max_requests=1)._translated


@pytest.mark.parametrize("translated", list(_translations()), ids=["s3", "hf", "oci", "cloud"])
@pytest.mark.parametrize("kind", [AttributeError, KeyError, TypeError, ValueError])
def test_only_what_parses_an_answer_blames_the_endpoint(translated: Translate, kind: type[Exception]) -> None:
    def defect() -> None:
        raise kind("oops")

    with pytest.raises(kind):
        translated(defect, "")
    with pytest.raises(StoreUnavailableError, match="the answer is not from"):
        translated(parsing()(defect), "")
