"""Jobs: commands that go on when the control file that began them is closed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio

from tests.support.parts import until
from tests.support.served import OWNER, STRANGER, Server, Serving
from tests.support.stores import MemoryStore
from tests.unit.control.common import begin, ended, jobs, last_line, on_disk
from trimsfs.control.authorisation import Caller
from trimsfs.control.jobs import MOST_ENDED
from trimsfs.errors import NoSuchEntryError, NotPermittedError, StoreAccessError
from trimsfs.handover.ledger import Ledger
from trimsfs.options import AccessRule


async def cancel(server: Server, number: str, directory: str = "", caller: Caller = OWNER) -> dict[str, Any]:
    """Cancel a job: what it has come to."""
    job: dict[str, Any] = json.loads(await server.content(f"{directory}/.trims/.trims/cancel-{number}", caller))
    return job


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin"])
async def test_a_job_goes_on_when_its_file_is_closed(
    server: Server, store: MemoryStore, sizes: dict[str, int], command: str
) -> None:
    gate = store.block(method="read")
    with trio.fail_after(5):
        job = await begin(server, "net/params", command)
    assert (job["state"], job["command"], job["path"], job["uid"]) == ("running", command, "net/params", OWNER.uid)
    assert [(each["id"], each["state"], each["ended"]) for each in await jobs(server)] == [(job["id"], "running", None)]
    gate.set()
    last = await ended(server, job["id"])
    assert (last["state"], last["done_bytes"], last["began"]) == ("done", sizes["net/params"], job["began"])
    assert await on_disk(server, "net/params") == sizes["net/params"]
    assert (await server.attribute("net/params", "pinned") == "true") == (command == "pin")


async def test_a_job_that_is_cancelled_fetches_nothing_more(server: Server, store: MemoryStore) -> None:
    store.block(method="read")
    job = await begin(server, "")
    await store.arrived(1)
    assert (await cancel(server, job["id"]))["state"] == "cancelled"
    await until(lambda: server.users() == 0)  # though the store answers nothing
    assert server.fetcher.statistics().in_flight == 0
    assert [each["state"] for each in await jobs(server)] == ["cancelled"]
    assert (await cancel(server, job["id"]))["state"] == "cancelled"


async def test_what_another_wants_goes_on_when_a_job_is_cancelled(server: Server, store: MemoryStore) -> None:
    gate = store.block(method="read")
    job = await begin(server, "net/params")
    handle = await server.open(await server.control_file("net/params", "warm-disk"))
    await store.arrived(1)
    await cancel(server, job["id"])
    gate.set()
    assert (await last_line(server, handle))["state"] == "done"


async def test_a_job_that_fails_tells_why(server: Server, store: MemoryStore) -> None:
    store.fail(StoreAccessError("not allowed"), times=float("inf"), key="net/params", method="read")
    last = await ended(server, (await begin(server, "net"))["id"])
    assert (last["state"], last["kind"], last["error"]) == ("failed", "StoreAccessError", "not allowed")
    assert (last["failed_files"], last["total_files"]) == (1, 3)


async def test_jobs_are_those_below_a_directory(server: Server) -> None:
    numbers = {path: (await begin(server, path))["id"] for path in ("net", "net/deep/er/weights", "other/params")}
    for directory, paths in {"": numbers, "net": ("net", "net/deep/er/weights"), "other": ("other/params",)}.items():
        assert [job["id"] for job in await jobs(server, directory)] == [numbers[path] for path in paths]
    for path in ("other", "net/deep"):
        with pytest.raises(NoSuchEntryError):
            await cancel(server, numbers["net"], path)
    with pytest.raises(NoSuchEntryError):
        await cancel(server, "0" * 8)


async def test_of_jobs_that_have_ended_the_last_are_listed(server: Server, store: MemoryStore) -> None:
    store.block(method="read")
    running = await begin(server, "net/params")
    numbers = []
    for _ in range(MOST_ENDED + 3):
        numbers.append((await begin(server, "empty"))["id"])
        await ended(server, numbers[-1])
    listed = [job["id"] for job in await jobs(server)]
    assert listed == [running["id"], *numbers[3:]]


async def test_others_see_jobs_about_what_they_may_read_and_begin_and_cancel_none(
    serving: Serving, store: MemoryStore
) -> None:
    store.block(method="read")
    async with serving(access=(AccessRule(path="other", uid=5, mode=0o400),)) as server:
        shown, hidden = await begin(server, "net/params"), await begin(server, "other/params")
        assert [job["id"] for job in await jobs(server)] == [shown["id"], hidden["id"]]
        assert [job["id"] for job in await jobs(server, caller=STRANGER)] == [shown["id"]]
        with pytest.raises(NotPermittedError):
            await cancel(server, shown["id"], caller=STRANGER)
        with pytest.raises(NotPermittedError):
            await server.command("background-warm-disk", "net/params", STRANGER)
        assert [job["state"] for job in await jobs(server)] == ["running", "running"]


@pytest.mark.parametrize("command", ["evict", "unpin", "verify"])
async def test_what_takes_no_fetch_is_no_job(server: Server, command: str) -> None:
    with pytest.raises(NoSuchEntryError):
        await begin(server, "net/params", command)


async def test_the_next_server_goes_on_with_a_job(
    serving: Serving, store: MemoryStore, sizes: dict[str, int], ledger: Callable[[], Ledger]
) -> None:
    gate = store.block(method="read")
    async with serving(ledger=ledger()) as server:
        before = [await begin(server, path) for path in ("net/params", "other")]
        over = await ended(server, (await begin(server, "empty"))["id"])
        cancelled = await cancel(server, (await begin(server, "net"))["id"])
    async with serving(ledger=ledger()) as server:
        assert [job["id"] for job in await jobs(server)] == [job["id"] for job in (*before, over, cancelled)]
        assert [job for job in await jobs(server) if job["ended"]] == [over, cancelled]
        gate.set()
        for job in before:
            last = await ended(server, job["id"])
            assert (last["state"], last["command"], last["began"]) == ("done", "warm-disk", job["began"])
        assert await on_disk(server, "net/params") == sizes["net/params"]
        assert await on_disk(server, "other/params") == sizes["other/params"]
    async with serving(ledger=ledger()) as server:
        assert {job["state"] for job in await jobs(server)} == {"done", "cancelled"}


async def test_a_job_of_which_the_end_was_half_recorded_has_ended(
    serving: Serving, ledger: Callable[[], Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed once the end is recorded, before the record of the beginning is free."""
    async with serving(ledger=ledger()) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "set_count", lambda *_: None)
            last = await ended(server, (await begin(server, "empty"))["id"])
    for _ in range(2):
        async with serving(ledger=ledger()) as server:
            assert await jobs(server) == [last]
