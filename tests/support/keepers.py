"""Keepers of mounts: what they say of their servers, and servers that they replace."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from mountctl.keeper.control_socket import ask
from tests.support.mounts import MountedStore, wait_until
from tests.support.processes import family
from trimsfs.options import keeper_order, load_options
from trimsfs.processes import title_of


def keeper(mount: MountedStore) -> dict[str, Any]:
    """What the keeper of a mount says, which takes no server."""
    return ask(mount.path, {"do": "status"}, timeout_s=5)


def roles(mount: MountedStore) -> dict[int, str]:
    """The roles of a mount's processes, by pid."""
    titles = {pid: title_of(pid) for pid in family(keeper(mount)["keeper_pid"])}
    return {pid: title.split(" ")[1] for pid, title in titles.items() if title.startswith("trimsfs ")}


def serving(mount: MountedStore, *, not_by: object = None) -> int:
    """Wait for a server that is ready, and another one that stands by."""
    return _serving(mount, not_by, stood_by=True)


def kill(mount: MountedStore) -> int:
    """Kill the server, whether another one stands by yet or not, and wait for the next."""
    pid = _serving(mount, None)
    os.kill(pid, signal.SIGKILL)
    return _serving(mount, pid)


@contextmanager
def hanging(mount: MountedStore) -> Iterator[None]:
    """The server says nothing meanwhile; nor does the keeper, which would replace it."""
    facts = keeper(mount)
    pids = [facts["keeper_pid"], facts["server_pid"]]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _serving(mount: MountedStore, not_by: object, *, stood_by: bool = False) -> int:
    def ready() -> bool:
        facts = keeper(mount)
        stands_by = bool(facts["standby"]) or not stood_by
        return facts["state"] == "serving" and stands_by and facts["server_pid"] != not_by

    wait_until(ready, timeout_s=30)
    pid: int = keeper(mount)["server_pid"]
    return pid


def have_serve(program: ModuleType, mount: MountedStore, store: str | Path, *arguments: str) -> None:
    """Have the server of a mount replaced by another program."""
    facts = ask(mount.path, {"do": "status"}, timeout_s=5)
    places = {"store": str(store), "cache_dir": str(mount.cache), "log_file": facts["log_file"]}
    options = load_options(places, environment={}).resolved(mount.path)
    order = keeper_order(mount.path, options, foreground=facts["foreground"])
    order["server"] = [sys.executable, str(program.__file__), *arguments]
    answer = ask(mount.path, {"do": "replace", "order": order}, timeout_s=60)
    assert "error" not in answer, answer
