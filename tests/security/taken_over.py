"""A server that somebody has taken over: in an order's ``server``, in place of ``trimsfs.daemon``.

It serves, confined as every server is, and once it does so turns against its keeper and its host in the way that its
first argument names, to what the file that is its third tells. What it was given and refused it writes to its second.
"""

import array
import ctypes
import errno
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from trimsfs.errors import StoreError
from trimsfs.handover.keeper_client import KeeperClient
from trimsfs.options import MountOptions
from trimsfs.server import lifecycle, startup
from trimsfs.stores.base import Store
from trimsfs.stores.local_directory import DirectoryStore
from trimsfs.stores.open import open_store

SEED = 7
MOST = 2000
"""Messages of a flood."""
_libc = ctypes.CDLL(None, use_errno=True)
_PTRACE_ATTACH = 16


class TakenOver(KeeperClient):
    """Serves, and then does what it should not."""

    def __init__(self, end: socket.socket, **options: Any) -> None:
        super().__init__(end, **options)
        self._end = end

    async def ready(self, *, resends: bool) -> None:
        """As every server, and then no more."""
        await super().ready(resends=resends)
        async with self._asking:  # answers are for the act alone
            self._end.setblocking(True)
            found = await trio.to_thread.run_sync(ACTS[ACT], self)
            self._end.setblocking(False)
        os.write(REPORT, json.dumps(found).encode() + b"\n")

    def say(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self._end.sendmsg([data], rights)

    def ask(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        self.say(json.dumps(message).encode(), descriptors)
        data, given, _, _ = socket.recv_fds(self._end, 4096, 4)
        for descriptor in given:
            os.close(descriptor)
        answer: dict[str, Any] = json.loads(data)
        return answer


def attempted(function: Callable[..., object], *arguments: object) -> str:
    """What comes of a call: the name of the errno, or that it was allowed."""
    try:
        function(*arguments)
    except StoreError as error:
        return type(error).__name__
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "OSError")
    return "allowed"


def called(name: str, *arguments: object) -> str:
    """The same of a function of the C library."""
    return "allowed" if getattr(_libc, name)(*arguments) >= 0 else errno.errorcode[ctypes.get_errno()]


def attack(keeper: TakenOver) -> dict[str, Any]:
    """Everything that would be of use to somebody who wants more than this server has."""
    found: dict[str, Any] = {}
    children = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    brokers = [pid for pid in children if Path(f"/proc/{pid}/cmdline").read_text().startswith("trimsfs broker")]
    for who, pid in {**VICTIMS["pids"], "its broker": brokers[0]}.items():
        found |= {
            f"kill {who}": attempted(os.kill, pid, signal.SIGURG),
            f"trace {who}": called("ptrace", _PTRACE_ATTACH, pid, None, None),
            f"memory of {who}": attempted(os.open, f"/proc/{pid}/mem", os.O_RDONLY),
            f"environment of {who}": attempted(Path(f"/proc/{pid}/environ").read_bytes),
            f"maps of {who}": attempted(Path(f"/proc/{pid}/maps").read_bytes),
            f"a descriptor of {who}": attempted(os.open, f"/proc/{pid}/fd/0", os.O_RDONLY),
        }
    for path in VICTIMS["unreadable"]:
        found[f"read {path}"] = attempted(Path(path).read_bytes)
    broker = STORES[0].broker
    assert broker is not None
    for path in VICTIMS["outside"]:
        for key in (path, f"../../../../../../../..{path}", f"out{path}"):
            found |= {
                f"have {key} opened": attempted(broker.open, key),
                f"have {key} looked at": attempted(broker.stat, key),
            }
    for path in VICTIMS["unwritable"]:
        found |= {
            f"write {path}": attempted(os.open, path, os.O_WRONLY),
            f"remove {path}": attempted(os.unlink, path),
            f"beside {path}": attempted(os.open, f"{path}.new", os.O_WRONLY | os.O_CREAT),
        }
    with socket.socket(socket.AF_UNIX) as end:
        found["ask the keeper as its operator"] = attempted(end.connect, VICTIMS["socket"])
    found |= {
        "become root": attempted(os.setuid, 0),
        "mount": called("mount", b"none", b"/mnt", b"tmpfs", 0, None),
        "have a namespace": called("unshare", 0x10000000),
    }
    files = {
        "a file that only root may read": ("/etc/shadow", os.O_PATH),
        "a directory": ("/etc", os.O_RDONLY),
        "the addresses of the kernel": ("/proc/kallsyms", os.O_RDONLY),
        "its own memory": ("/proc/self/mem", os.O_RDONLY),
        "memory": ("memory", 0),
        "another connection to the kernel": ("/dev/fuse", os.O_RDWR),
        "a device": ("/dev/zero", os.O_RDONLY),
    }
    for what, (path, flags) in files.items():
        try:
            file = os.memfd_create(path) if what == "memory" else os.open(path, flags)
        except OSError as error:
            found[f"have {what}"] = errno.errorcode[error.errno or 0]
            continue
        if what != "memory":
            answers = [
                keeper.ask({"type": "backing-open"}, [file]),
                *keeper.ask({"type": "backing-open", "count": 2}, [file, file])["answers"],
            ]
            errors = {errno.errorcode[answer["errno"]] if "errno" in answer else "allowed" for answer in answers}
            found[f"have the kernel read {what}"] = ", ".join(errors)
        if what != "a device":
            answer = keeper.ask({"type": "hold", "number": 1}, [file])
            found[f"have {what} held"] = answer.get("error", "allowed")
        os.close(file)
    return found


def hoard(keeper: TakenOver) -> dict[str, Any]:
    """Have the keeper hold what it can, and what it cannot."""
    device = os.open("/dev/null", os.O_RDONLY)
    answers = [keeper.ask({"type": "hold", "number": number}, [device]) for number in range(1, 1000)]
    return {"held": sum("error" not in answer for answer in answers), "error": answers[-1].get("error")}


def flood(keeper: TakenOver) -> dict[str, Any]:
    """Ask and hear no answer, so that they fill the channel."""
    for _ in range(MOST):
        keeper.say(b'{"type": "recall", "number": 1}')
        keeper.say(b'{"type": "backing-close", "id": 2147483647}')
    return {}


def babble(keeper: TakenOver) -> dict[str, Any]:
    """Say what no server says. The next one is well behaved."""
    if os.fstat(REPORT).st_size == 0:
        os.write(REPORT, b"{}\n")
        keeper.say(random.Random(SEED).randbytes(4000), [REPORT])
        signal.pause()
    return {}


def complain(keeper: TakenOver) -> dict[str, Any]:
    """Have the keeper log what it has not seen."""
    text = "no\n2026-01-02 03:04:05,678 ERROR trimsfs.server.lifecycle: forged\x1b[2J" * 50
    keeper.say(json.dumps({"type": "failed", "kind": "StoreError", "error": text}).encode())
    return {}


def remembered(options: MountOptions, *, max_requests: int) -> Store:
    """The store of this server, with what reads for it."""
    store = open_store(options, max_requests=max_requests)
    assert isinstance(store, DirectoryStore)
    STORES.append(store)
    return store


STORES: list[DirectoryStore] = []
ACTS = {act.__name__: act for act in (attack, hoard, flood, babble, complain)}

if __name__ == "__main__":
    ACT, REPORT = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    VICTIMS = json.loads(Path(sys.argv[3]).read_text())
    del sys.argv[1:4]
    vars(lifecycle)["KeeperClient"] = TakenOver
    vars(startup)["open_store"] = remembered
    startup.main()
