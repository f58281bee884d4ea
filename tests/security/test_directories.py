"""A directory store in which somebody else may write: nothing from outside of it is ever shown."""

import json
import os
import signal
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.contract.backends import read
from tests.support.mounts import mounted
from tests.support.survival import Survived
from tests.support.tmpfs import tmpfs
from tests.support.users import SERVER_USER, as_user
from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, StoreError, TransientStoreError
from trimsfs.server.sandbox import CAP_DAC_READ_SEARCH, become, fence, identity
from trimsfs.stores.base import Page
from trimsfs.stores.broker import Broker
from trimsfs.stores.local_directory import DirectoryStore
from trimsfs.types import SIZE_MAX, Generation

SECRET, HARMLESS = b"secret of another" * 100, b"weights of a model" * 100
ROUNDS = 1500


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Another process that exchanges two names without a pause."""
    spare = one.with_name(f"{one.name}-spare")
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                os.rename(one, spare)
                os.rename(other, one)
                os.rename(spare, other)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("component", ["file", "directory"])
async def test_nothing_from_outside_comes_while_links_are_exchanged(
    component: str, tmp_path: Path, survived: Survived
) -> None:
    """A component of the path is a link that leads out at one moment and none at the next."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory, content in ((root / "dir", HARMLESS), (outside, SECRET)):
        directory.mkdir(parents=True)
        (directory / "model").write_bytes(content)
    right, link = (root / "dir/model", root / "dir/link") if component == "file" else (root / "dir", root / "link")
    link.symlink_to(outside / "model" if component == "file" else outside)
    beyond = (outside / "model").stat()
    store = DirectoryStore(root)
    errors: Counter[str] = Counter()
    seen = wrong = 0
    with swapping(right, link):
        for _ in range(ROUNDS):
            try:
                page = await store.list_page("dir/")
                found = await store.stat("dir/model")
                # As if it had been there before: the size and the times are those of the file outside.
                lie = Generation(
                    key="dir/model", etag=_etag(beyond), size=beyond.st_size, modified_ns=beyond.st_mtime_ns
                )
                for generation in (*page.objects, found, lie):
                    wrong += generation is not lie and generation.etag == _etag(beyond)
                    wrong += await read(store, generation) != HARMLESS
                    seen += 1
            except (ObjectNotFoundError, ObjectChangedError, TransientStoreError) as error:
                errors[type(error).__name__] += 1
    await store.aclose()
    assert errors.total() > ROUNDS // 100
    survived(
        f"links exchanged, {component}",
        injected=ROUNDS,
        operations=seen + errors.total(),
        errors=errors,
        allowed=["ObjectNotFoundError", "ObjectChangedError", "TransientStoreError"],
        wrong=wrong,
    )


def _etag(status: os.stat_result) -> str:
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(f"{number:x}" for number in numbers)


# What reads for a server


@pytest.fixture
def brokered(tmp_path: Path) -> Iterator[DirectoryStore]:
    """A store that only root may enter, and all that is in it, with a broker; beside it is what else only root may
    read for that reason alone."""
    private = tmp_path / "private"
    root = private / "store"
    (root / "dir").mkdir(parents=True)
    (private / "beside").write_bytes(SECRET)
    for name in ("dir/model", "model"):
        (root / name).write_bytes(HARMLESS)
        (root / name).chmod(0o600)
    (root / "link").symlink_to("dir/model")
    (root / "out").symlink_to("../beside")
    (root / "shadow").symlink_to("/etc/shadow")
    (root / "up").symlink_to("..")
    os.mkfifo(root / "fifo")
    os.mknod(root / "memory", 0o666 | stat.S_IFCHR, os.makedev(1, 1))
    (root / "dir").chmod(0o700)
    private.chmod(0o700)
    store = DirectoryStore(root)

    def confine() -> None:
        become(identity(str(SERVER_USER)), keep=CAP_DAC_READ_SEARCH)
        fence([])

    store.broker = Broker(store.local, confine=confine, mountpoint=tmp_path, not_for_it=[])
    yield store
    store.broker._socket.close()
    os.waitpid(store.broker.process.pid, 0)


@pytest.fixture
def broker(brokered: DirectoryStore) -> Broker:
    assert isinstance(brokered.broker, Broker)
    return brokered.broker


def as_server(function: Callable[[], Any]) -> Any:
    return as_user(SERVER_USER, function)


def test_a_broker_that_does_not_answer_holds_no_thread(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(broker.process.pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("trimsfs.stores.broker.ANSWER_TIMEOUT_S", 0.2)
            with pytest.raises(TransientStoreError, match="the broker did not answer"):
                broker.stat("model")
    finally:
        os.kill(broker.process.pid, signal.SIGCONT)
    assert broker.stat("model").size == len(HARMLESS)


def test_a_server_reads_what_root_may_of_the_store(brokered: DirectoryStore) -> None:
    async def look() -> tuple[Page, Page, list[bytes]]:
        pages = [await brokered.list_page(prefix) for prefix in ("", "dir/")]
        contents = [await read(brokered, await brokered.stat(key)) for key in ("model", "link", "dir/model")]
        await brokered.probe()
        for key in ("absent", "out", "shadow", "up/beside", "fifo", "memory", "../beside"):
            with pytest.raises(ObjectNotFoundError):
                await brokered.stat(key)
        return pages[0], pages[1], contents

    top, below, contents = as_server(partial(trio.run, look))
    assert [generation.key for generation in top.objects] == ["link", "model"]
    assert (top.prefixes, top.unreadable) == (("dir/",), ())
    assert [generation.key for generation in below.objects] == ["dir/model"]
    assert contents == [HARMLESS] * 3
    alone = DirectoryStore(brokered.local.root)
    with pytest.raises(AssertionError, match=rf"{alone.local.root}: Permission denied: let uid {SERVER_USER}"):
        as_server(partial(trio.run, alone.probe))


def test_a_server_gets_nothing_else_from_its_broker(brokered: DirectoryStore, broker: Broker) -> None:
    """Nor a directory, which would lead to what lies beside the store."""
    root = brokered.local.root
    lies = ["../beside", f"{root.parent}/beside", "/etc/shadow", "out", "shadow", "up/beside", "dir/../../beside"]
    none = ["", ".", "dir", "dir/", "..", "fifo", "memory", "absent", "a\0b", "\ud800", "x" * 5000, "/proc/self/mem"]

    def attack() -> dict[str, object]:
        found: dict[str, object] = {}
        for key in (*lies, *none):
            for what, ask in (("open", broker.open), ("stat", broker.stat)):
                try:
                    found[f"{what} {key[:20]}"] = ask(key)
                except (OSError, StoreError):
                    continue
        for prefix in ("..", "/", "/etc/", "up/", "dir/../../"):
            page = broker.list_page(prefix, None, 1000)
            if page.exists:
                found[f"list {prefix}"] = page
        return found

    assert as_server(attack) == {}


def test_a_broker_answers_on_whatever_it_is_asked(broker: Broker) -> None:
    end = broker._socket
    good = {"do": "open", "key": "model"}
    bad: list[object] = [
        *(b"\xff", b"{", b"[]", b"null", b"[" * 60_000, {}, {"do": "write", "key": "model"}, {"do": "list", "key": ""}),
        {"do": "list", "key": "", "token": None, "limit": -1},
        {"do": "list", "key": "", "token": 1, "limit": 1},
        *({"do": "open", "key": key} for key in (None, 7, ["model"], {"key": "model"})),
    ]

    def ask() -> list[bytes]:
        answers = []
        for message in bad:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    data = message if isinstance(message, bytes) else json.dumps(message).encode()
                    socket.send_fds(end, [data], [theirs.fileno()])
                ours.settimeout(10)
                answers.append(ours.recv(100))
            end.send(json.dumps(good).encode())  # and nowhere to answer to
        for number in range(100):  # nobody hears the answer
            ours, theirs = socket.socketpair()
            with ours, theirs:
                socket.send_fds(end, [json.dumps(good).encode()], [theirs.fileno(), end.fileno()][: 1 + number % 2])
        return answers

    assert set(as_server(ask)) == {b""}
    assert as_server(partial(broker.stat, "model")).size == len(HARMLESS)


@pytest.mark.parametrize("component", ["file", "directory"])
def test_a_broker_opens_nothing_from_outside_while_links_are_exchanged(
    component: str, brokered: DirectoryStore, broker: Broker
) -> None:
    root = brokered.local.root
    (root.parent / "outside").mkdir()
    (root.parent / "outside/model").write_bytes(SECRET)
    (root / "away").symlink_to(root.parent / ("beside" if component == "file" else "outside"))
    right = root / ("dir/model" if component == "file" else "dir")

    def ask() -> Counter[bytes]:
        found = Counter[bytes]()
        for _ in range(ROUNDS):
            try:
                descriptor = broker.open("dir/model")
            except (StoreError, OSError):
                found[b""] += 1
                continue
            with open(descriptor, "rb") as file:
                found[file.read()] += 1
        return found

    with swapping(right, root / "away"):
        found = as_server(ask)
    assert set(found) == {HARMLESS, b""}


def test_nothing_is_served_that_is_no_file_of_the_store(store_directory: Path, tmp_path: Path) -> None:
    """Not by another name either; a file may tell any size and time."""
    outside = tmp_path / "outside"
    outside.write_bytes(SECRET)
    outside.chmod(0o600)
    with tmpfs(store_directory, 1 << 20):
        (store_directory / "model").write_bytes(HARMLESS)
        os.mkfifo(store_directory / "fifo")
        os.mknod(store_directory / "memory", 0o666 | stat.S_IFCHR, os.makedev(1, 1))
        os.mknod(store_directory / "zeros", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        os.mknod(store_directory / "disk", 0o666 | stat.S_IFBLK, os.makedev(7, 0))
        (store_directory / "link").symlink_to(outside)
        (store_directory / "fd").symlink_to("/proc/self/fd")
        (store_directory / "mine").write_bytes(SECRET)
        os.link(store_directory / "mine", store_directory / "hard")
        (store_directory / "hard").chmod(0o600)
        for name, size in (("sparse", SIZE_MAX), ("too-sparse", SIZE_MAX + 1)):
            (store_directory / name).touch()
            os.truncate(store_directory / name, size)
        for name, time_s in (("old", -(1 << 40)), ("new", 1 << 40)):
            (store_directory / name).write_bytes(HARMLESS)
            os.utime(store_directory / name, (time_s, time_s))
        with mounted(store_directory, tmp_path, "--cold-open", "stream", "--min-free", "0") as mount:
            assert set(os.listdir(mount.path)) == {"model", "mine", "hard", "sparse", "old", "new"}
            for name in ("fifo", "memory", "zeros", "disk", "link", "fd", "fd/0", "too-sparse"):
                with pytest.raises(FileNotFoundError):
                    (mount.path / name).read_bytes()
            for name in ("mine", "hard"):  # all links are
                assert (mount.path / name).read_bytes() == SECRET
            for name in ("model", "old", "new"):
                assert (mount.path / name).read_bytes() == HARMLESS
            with (mount.path / "sparse").open("rb", buffering=0) as file:
                assert os.pread(file.fileno(), 10, SIZE_MAX - 5) == bytes(5)
            assert mount.metrics()["trimsfs_names_hidden_keys"] == 1
