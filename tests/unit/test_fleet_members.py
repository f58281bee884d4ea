"""Who the members of a fleet are, where chunks are placed on them, and what a host thinks of them."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import trio
from trio.testing import MockClock

from tests.support.parts import until
from trimsfs.extras.fleet.fleet import MOST_MEMBERS, Fleet
from trimsfs.extras.fleet.member_health import (
    FAILING_S,
    FIRST_RATE,
    LEAST_PATIENCE_S,
    LONGEST_PAUSE_S,
    MOST_PATIENCE_S,
    STRIKES,
    STRIKES_PAUSE_S,
    Health,
    RetryBudget,
)
from trimsfs.extras.fleet.members import Members
from trimsfs.extras.fleet.placement import Placement, seed_of
from trimsfs.extras.fleet.protocol import AWAY_S
from trimsfs.fetch.peers import Outcome, PeerAnswer
from trimsfs.handover.ledger import Ledger
from trimsfs.listen_address import parse_address
from trimsfs.options import MountOptions

HOSTS = [f"10.0.0.{number}:7443" for number in range(20)]
CHUNKS = range(2000)
MIB = 1 << 20


def ranked(members: list[str], count: int = 2) -> list[list[str]]:
    placement, content = Placement(members), seed_of("model")
    return [placement.ranked(content, chunk, count) for chunk in CHUNKS]


def test_chunks_are_spread_evenly() -> None:
    for place in (0, 1):
        loads = Counter(owners[place] for owners in ranked(HOSTS))
        assert set(loads) == set(HOSTS)
        assert max(loads.values()) < 1.4 * len(CHUNKS) / len(HOSTS)


def test_a_member_that_leaves_moves_only_its_own_chunks() -> None:
    before, after = ranked(HOSTS, len(HOSTS)), ranked(HOSTS[1:], len(HOSTS))
    assert [[member for member in order if member != HOSTS[0]] for order in before] == after


def test_a_chunk_is_ranked_once_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    placement, content = Placement(HOSTS), seed_of("model")
    owners = placement.ranked(content, 5, 3)
    monkeypatch.setattr("trimsfs.extras.fleet.placement._mixed", None)
    assert placement.ranked(content, 5, 3) == owners
    assert placement.ranked(content, 5, 2, without={owners[0], "another"}) == owners[1:]


@pytest.mark.parametrize("left", [0, 1, 7, 8, 17, 20])
def test_whoever_is_left_out_the_others_keep_their_order(left: int) -> None:
    placement, content = Placement(HOSTS), seed_of("model")
    for chunk in range(20):
        order = placement.ranked(content, chunk, len(HOSTS))
        assert placement.ranked(content, chunk, 4, without=set(order[:left])) == order[left:][:4]
        assert placement.ranked(content, chunk, 9) == order[:9]


@pytest.mark.parametrize(
    ("listed", "listen", "addresses", "mine"),
    [
        ("10.0.0.1:7,10.0.0.2", "10.0.0.2:7443", {"10.0.0.1:7", "10.0.0.2:7443"}, {"10.0.0.2:7443"}),
        (" [fd00::1]:7 , fd-host ", "10.0.0.9:7443", {"[fd00::1]:7", "fd-host:7443"}, set()),
        ("10.0.0.1:7", "10.0.0.9:7443", {"10.0.0.1:7"}, set()),
        # One name stands for all of its addresses; an address may be spelled in several ways.
        ("fleet.svc:7443", "10.0.0.2:7443", {"10.0.0.1:7443", "10.0.0.2:7443"}, {"10.0.0.2:7443"}),
        ("[fd00:0:0::0001],[FD00::2]", "[fd00::1]:7443", {"[fd00::1]:7443", "[fd00::2]:7443"}, {"[fd00::1]:7443"}),
        ("[fd00:0:0::0001],[FD00::2]", "[FD00:0::1]:7443", {"[fd00::1]:7443", "[fd00::2]:7443"}, {"[fd00::1]:7443"}),
    ],
)
def test_a_list_names_members_and_this_host(
    listed: str, listen: str, addresses: set[str], mine: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _no_names_but({"fleet.svc": ["10.0.0.1", "10.0.0.2"]}))
    assert Members(listed, parse_address(listen)).read() == (frozenset(addresses), frozenset(mine))


def _no_names_but(names: dict[str, list[str]]) -> Callable[..., object]:
    def getaddrinfo(host: str, *_: object, **__: object) -> object:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in names[host]]

    return getaddrinfo


@pytest.mark.parametrize(
    ("listen", "mine"),
    [
        ("127.0.0.1:7443", {"127.0.0.1:7443"}),
        ("0.0.0.0:7443", {"127.0.0.1:7443", "127.0.0.2:7443"}),
        ("[::]:7443", {"127.0.0.1:7443", "127.0.0.2:7443"}),
        ("0.0.0.0:7444", set()),
        ("10.0.0.1:7443", {"10.0.0.1:7443"}),
        ("10.0.0.3:7443", set()),
    ],
)
def test_a_host_knows_all_of_its_own_entries(listen: str, mine: set[str]) -> None:
    members = Members("10.0.0.1:7443,127.0.0.1:7443,127.0.0.2:7443,192.0.2.1:7443", parse_address(listen))
    assert members.read()[1] == mine


async def test_the_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trimsfs.extras.fleet.members.INTERVAL_S", 0.01)
    file = tmp_path / "members"
    file.write_text("# ours\n10.0.0.1:7\n\n10.0.0.2:7 # second\n")
    members = Members(str(file), parse_address("10.0.0.1:7"))
    async with trio.open_nursery() as nursery:
        await nursery.start(members.run)
        assert (members.addresses, members.me) == (frozenset({"10.0.0.1:7", "10.0.0.2:7"}), "10.0.0.1:7")
        file.with_suffix(".new").write_text("10.0.0.2:7\n")
        file.with_suffix(".new").rename(file)
        await until(lambda: members.addresses == {"10.0.0.2:7"})
        assert (members.me, members.mine) == (None, frozenset({"10.0.0.1:7"}))  # others may list it still
        file.unlink()
        await until(lambda: len(caplog.records) == 2)
        assert members.addresses == {"10.0.0.2:7"}
        nursery.cancel_scope.cancel()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "not on the list of members, of 1:" in warnings[0]
    assert "the earlier list stays" in warnings[1]
    caplog.clear()


async def test_an_empty_list_leaves_the_members_of_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "members"
    file.write_text("10.0.0.1:7\n10.0.0.2:7\n")
    members, problems = Members(str(file), parse_address("10.0.0.1:7")), list[str | None]()
    await members.refresh()
    file.write_text("# nobody\n")
    for age_s in (0, 10):  # at first, somebody may be writing it
        os.utime(file, (time.time() - age_s,) * 2)
        await members.refresh()
        problems.append(members.problem)
    assert (problems, len(members.addresses)) == ([None, "no member is listed"], 2)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"fleet: members not read, the earlier list stays: {file}: no member is listed"]
    caplog.clear()


async def test_names_are_looked_up_rarely_and_for_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups, names = list[str](), {"a": ["10.0.0.1"], "b": ["10.0.0.2"]}
    answers = _no_names_but(names)

    def slow(host: str, *_: object, **__: object) -> object:
        lookups.append(host)
        time.sleep(0.2)
        return answers(host)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    members = Members("a,b,none", parse_address("10.0.0.2:7443"))
    for count in (1, 2, 3, 3):
        found = members.read(resolving_s=0.1)
        assert len(lookups) == count
    assert found == (frozenset({"a:7443", "b:7443", "none:7443"}), frozenset({"b:7443"}))
    members._names = {host: (addresses, 0.0) for host, (addresses, _) in members._names.items()}
    names.clear()
    # DNS has gone, this host still knows itself
    assert [members.read(resolving_s=0.1) for _ in range(4)] == 4 * [found]
    assert sorted(lookups) == sorted(2 * ["a", "b", "none"])


@pytest.mark.parametrize("line", ["bad line here", "https://10.0.0.1:7", "10.0.0.1:70000", ":7", "a:b"])
async def test_a_line_that_is_no_member_is_told(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "members"
    file.write_text(f"10.0.0.1:7\n{line}\n")
    members = Members(str(file), parse_address("10.0.0.1:7"))
    await members.refresh()
    assert (members.problem, members.addresses) == (f"'{line}' is not HOST:PORT", frozenset())
    file.unlink()
    await members.refresh()
    assert [record.getMessage() for record in caplog.records] == [
        f"fleet: members not read, this host fetches alone: {file}: {problem}"
        for problem in (f"'{line}' is not HOST:PORT", "No such file or directory")
    ]
    file.write_text("10.0.0.1:7\n")
    await members.refresh()
    assert (members.problem, members.me) == (None, "10.0.0.1:7")
    caplog.clear()


async def test_a_file_that_is_being_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a list would move the chunks of the other half."""
    monkeypatch.setattr("trimsfs.extras.fleet.members.INTERVAL_S", 0.01)
    monkeypatch.setattr("trimsfs.extras.fleet.members.SETTLED_S", 1.5)
    file = tmp_path / "members"
    file.write_text("10.0.0.1:7\n10.0.0.2:7\n")
    members, seen = Members(str(file), parse_address("10.0.0.1:7")), set[int]()
    async with trio.open_nursery() as nursery:
        await nursery.start(members.run)
        await until(lambda: len(members.addresses) == 2)
        for written in ("", "10.0.0.1:7\n10.0", "10.0.0.1:7\n10.0.0.2:7\n"):
            file.write_text(written)
            await trio.sleep(0.05)
            seen.add(len(members.addresses))
        file.write_text("10.0.0.1:7\n10.0.0.2:7\n10.0.0.3:7\n")
        await until(lambda: len(members.addresses) == 3)
        nursery.cancel_scope.cancel()
    assert seen == {2}


async def test_an_address_that_a_request_has_found_stays_this_hosts(tmp_path: Path) -> None:
    file = tmp_path / "members"
    file.write_text("10.0.0.1:7\n10.0.0.2:7\n")
    members = Members(str(file), parse_address("192.0.2.1:7"))
    members.addresses = members.read()[0]
    members.found("10.0.0.2:7")
    await members.refresh()
    assert (members.me, members.mine) == ("10.0.0.2:7", frozenset({"10.0.0.2:7"}))


async def test_a_host_that_is_not_listed_guesses_its_address() -> None:
    members = Members("127.0.0.1:7,127.0.0.2:7", parse_address("0.0.0.0:7443"))
    await members.refresh()
    assert (members.me, members.mine) == (None, frozenset({"127.0.0.1:7443"}))


def answer(outcome: Outcome, received: int = 0, body_s: float = 0.0) -> PeerAnswer:
    return PeerAnswer(outcome=outcome, received=received, body_s=body_s)


async def test_a_member_that_fails_is_left_alone_longer_each_time(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    health, pauses = Health(), []
    for _ in range(8):
        health.answered("a", answer("unreachable"))
        began = trio.current_time()
        while "a" in health.down():  # noqa: ASYNC110 - there is no event
            await trio.sleep(0.1)
        pauses.append(round(trio.current_time() - began, 1))
    assert pauses == sorted(pauses)
    assert pauses[0] < 1.2
    assert LONGEST_PAUSE_S <= pauses[-1] < LONGEST_PAUSE_S + 0.2
    assert len(caplog.records) == 1  # one line, however often
    health.answered("a", answer("absent"))
    assert health.of("a").failures == 0
    caplog.clear()


async def test_a_member_counts_as_failing_until_it_answers_or_nobody_has_asked_it_for_long(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    health = Health()
    for outcome in ("absent", "away"):
        health.answered("a", answer("unreachable"))
        assert health.failing() == {"a"}
        health.answered("a", answer(outcome))
        assert health.failing() == set()
    await trio.sleep(AWAY_S)
    health.answered("a", answer("unreachable"))
    await trio.sleep(FAILING_S)
    assert health.failing() == {"a"}
    await trio.sleep(LONGEST_PAUSE_S)
    assert health.failing() == set()
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3  # one that was drained fails, too
    caplog.clear()


async def test_a_member_may_be_away_for_days(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    health = Health()
    for _ in range(1100):
        health.answered("a", answer("unreachable"))
        assert "a" in health.down()
        await trio.sleep(LONGEST_PAUSE_S + 1)
    assert "a" not in health.down()
    caplog.clear()


async def test_wrong_bytes_are_strikes_and_an_answer_that_was_under_way_ends_no_ban(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    health = Health()
    for _ in range(STRIKES):
        assert "a" not in health.down()
        health.answered("a", answer("damaged"))
    assert [record.levelname for record in caplog.records].count("ERROR") == STRIKES
    for outcome in get_args(Outcome):
        if outcome != "damaged":
            health.answered("a", answer(outcome))
    await trio.sleep(STRIKES_PAUSE_S - 1)
    assert "a" in health.down()
    assert health.failing() == {"a"}
    await trio.sleep(2)
    assert "a" not in health.down()
    health.answered("a", answer("ok"))
    assert health.failing() == set()
    caplog.clear()


async def test_who_is_slow_or_has_much_to_send_comes_later(autojump_clock: MockClock) -> None:
    health = Health()
    assert health.expected_s("a", MIB) == MIB / FIRST_RATE
    for member, rate in (("a", 10e6), ("b", 10e6), ("slow", 1e6)):
        health.answered(member, answer("ok", MIB, MIB / rate))
    assert health.expected_s("slow", MIB) > 5 * health.expected_s("a", MIB)
    health.of("a").outstanding = 8 * MIB
    assert health.expected_s("a", MIB) > health.expected_s("b", MIB)
    await trio.sleep(60)
    assert health.expected_s("slow", MIB) == health.expected_s("b", MIB)  # it is asked again


async def test_whose_bodies_were_given_up_is_slow_for_a_while(autojump_clock: MockClock) -> None:
    health = Health()
    health.answered("a", answer("ok", MIB, 0.1))
    assert not health.is_slow("a")
    health.answered("a", answer("slow", MIB // 8, 2.5))
    assert health.expected_s("a", MIB) == pytest.approx(20)
    assert not health.is_slow("a")
    health.answered("a", answer("slow", MIB // 8, 2.5))
    assert health.is_slow("a")
    await trio.sleep(60)
    assert not health.is_slow("a")
    health.answered("a", answer("slow", MIB // 8, 2.5))
    assert health.is_slow("a")
    health.answered("a", answer("ok", MIB, 0.1))
    assert not health.is_slow("a")


async def test_patience_is_by_what_shares_the_link(autojump_clock: MockClock) -> None:
    health = Health()
    for _ in range(20):
        health.answered("a", answer("ok", MIB, 0.01))
        await trio.sleep(0.1)
    alone = health.patience_s(8 * MIB)
    assert LEAST_PATIENCE_S <= alone < 8
    health.of("b").outstanding = 100 * MIB
    assert 20 < health.patience_s(8 * MIB) < 80
    health.of("b").outstanding = 10_000 * MIB
    assert health.patience_s(8 * MIB) == MOST_PATIENCE_S


async def test_the_store_is_asked_for_a_tenth_of_what_members_give(autojump_clock: MockClock) -> None:
    budget, began = RetryBudget(), trio.current_time()
    for _ in range(int(budget.MOST)):
        await budget.take()
    assert trio.current_time() == began
    for _ in range(30):
        budget.add()
    for _ in range(3):
        await budget.take()
    assert trio.current_time() == began
    for _ in range(4):
        await budget.take()
    assert trio.current_time() == began + 4 * budget.REFILL_S


async def test_who_is_cancelled_while_it_waits_for_a_turn_takes_none(autojump_clock: MockClock) -> None:
    budget, began = RetryBudget(), trio.current_time()
    for _ in range(int(budget.MOST)):
        await budget.take()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(budget.take)
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    await budget.take()
    assert trio.current_time() == began + budget.REFILL_S


async def test_who_waits_for_a_turn_gets_what_members_give_meanwhile_and_waits_for_so_long_at_most(
    autojump_clock: MockClock,
) -> None:
    budget, began = RetryBudget(), trio.current_time()
    waited = list[float]()

    async def take() -> None:
        await budget.take()
        waited.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for _ in range(int(budget.MOST) + 30):
            nursery.start_soon(take)
        await trio.sleep(budget.REFILL_S / 2)
        for _ in range(51):
            budget.add()
    assert waited.count(0.0) == budget.MOST
    assert waited.count(budget.REFILL_S) == 1 + 5
    assert budget.LONGEST_WAIT_S / 2 <= max(waited) <= budget.LONGEST_WAIT_S


async def test_the_numbers_of_single_members_are_bounded() -> None:
    nothing: Any = None
    files = {f"fleet_{name}": f"/{name}.pem" for name in ("ca", "cert", "key")}
    options = MountOptions(fleet="models", fleet_members=HOSTS[0], fleet_listen=HOSTS[0], **files)
    fleet = Fleet(options, nothing, nothing, Ledger(), came=lambda _blob, _size: None)
    for number in range(2 * MOST_MEMBERS):
        fleet.health.answered(f"{number}:7443", answer("ok", number))
    fleet.health.of("100:7443").strikes = 2
    numbers = fleet.statistics()
    assert numbers.member_received_bytes.values == {(f"{number}:7443",): number for number in range(MOST_MEMBERS)}
    assert numbers.member_strikes.values == {("100:7443",): 2}
