"""The status of a mount: what its keeper tells, what the mount itself shows to everybody, and how its store is."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mountctl.commands.declared_mounts import NamedMount
from mountctl.keeper.control_socket import KeeperGoneError, KeeperRefusesError, ask
from mountctl.linux import child_process, mounting, systemd
from mountctl.linux.child_process import HangsError
from trimsfs.mountinfo import trimsfs_at

ANSWER_TIMEOUT_S = 5.0
DEAD = "dead"
"""The state of a mount whose keeper and servers have ended."""
_KINDS = {
    "state": str,
    "keeper_pid": int,
    "server_pid": int | None,
    "restarts": int,
    "last_end": str | None,
    "last_end_at": float | None,
    "log_file": str,
    "foreground": bool,
    "environment": dict,
}
"""What a keeper's status has. Root asks keepers of other users, who may have replaced theirs."""
DEGRADED = 1
"""The exit code for a mount that a server serves without a keeper, or without its store."""
PROBE_S = 4.0
"""How long `up`, `restart` and `upgrade` wait for what the store answers to the new server."""

HIDDEN, NOT_KEPT = "hidden", "not kept"
"""The states of a mount that denies this user access, and of one that a server serves without a keeper."""
POLL_S = 0.1
STATUS_LIMIT = 1 << 20
EMPTY = "there is nothing under it: check the spelling if you expect objects"


def with_store(mount: NamedMount, facts: dict[str, Any]) -> dict[str, Any]:
    """The status of a mount with that of its store, which the keeper does not know."""
    if facts["state"] not in {"serving", NOT_KEPT}:
        return facts
    return facts | store_status(mount.mountpoint)


def status_of(mount: NamedMount) -> dict[str, Any]:
    """The status of a mount, from the kernel's mount table and from its keeper."""
    if trimsfs_at(mount.mountpoint) is None:
        return {"state": "down"}
    try:
        facts = ask(mount.mountpoint, {"do": "status"}, timeout_s=ANSWER_TIMEOUT_S)
        if "state" not in facts or not all(
            isinstance(facts[name], _KINDS[name]) for name in facts.keys() & _KINDS.keys()
        ):
            raise KeeperRefusesError(f"what the keeper of {mount.mountpoint} answers is no status")
        return facts
    except KeeperRefusesError as error:
        return public_status(mount.mountpoint) | {"hidden": str(error)}
    except KeeperGoneError as error:
        state = _state_without_keeper(mount.mountpoint)
        problem = str(error)
        if state == DEAD:
            problem = f"keeper and server have ended: `trimsfs umount {mount.mountpoint}`, and mount it again"
        elif mount.managed and systemd.restarts(mount.name):
            problem = f"{problem.partition(': run ')[0]}: systemd starts another within {systemd.WATCHDOG_S} s"
        elif mount.managed and (keeper := systemd.keeper_of(mount.name)) is not None:
            problem = f"{problem.partition(': run ')[0]}: run `systemctl restart {keeper}`"
        return {"state": state, "error": problem}


def _state_without_keeper(mountpoint: Path) -> str:
    answers = mounting.answers(mountpoint, timeout_s=ANSWER_TIMEOUT_S)
    return "hanging" if answers is None else NOT_KEPT if answers else DEAD


def environment_of(facts: dict[str, Any]) -> dict[str, str] | None:
    """The variables that hold for a mount with this status: those of its service. None for those of this process."""
    environment: dict[str, str] | None = facts.get("environment") if facts.get("foreground") else None
    return environment


def without_store(mount: NamedMount, *, patience_s: float = 0.0) -> int:
    """Tell that a mount hangs, or is served without its store, or with an empty one; the exit code."""
    status = store_status(mount.mountpoint, patience_s=patience_s)
    for each in filter(None, status.values()):
        click.echo(f"mountctl: {mount.name}: {each}", err=True)
    return DEGRADED if status.get("store_problem") else 0


def public_status(mountpoint: Path) -> dict[str, Any]:
    """The status of a mount, from its server."""
    facts, message = _control(mountpoint)
    if message is None:
        return {"state": "hanging"}
    if facts is not None:
        names = ("server_pid", "keeper_pid", "restarts", "log_file")
        status = {"state": "serving"} | {name: facts[name] for name in names if name in facts}
        kept = facts.get("keeper_problem") is None
        return status if kept else status | {"state": NOT_KEPT, "error": facts["keeper_problem"]}
    return {"state": HIDDEN if "Permission denied" in message else "dead"}


def store_status(mountpoint: Path, *, patience_s: float = 0.0) -> dict[str, str | None]:
    """The status of a mount's store: ``store_problem`` and ``store_note``.

    The problem says why the store does not answer or what it refuses, the note that there is nothing in it. Each is
    None where there is nothing to tell. The status is empty for a mount that denies this user access. A server that has
    just taken over asks its store first: this waits for that, up to *patience_s*.
    """
    deadline = time.monotonic() + patience_s
    while True:
        facts, message = _control(mountpoint)
        if message is None:
            return {"store_problem": f"{mountpoint} does not answer: see `mountctl logs {mountpoint}`"}
        if facts is None:
            return {}
        if facts.get("store_known", True) or time.monotonic() >= deadline:
            why: str | None = facts.get("store_problem")
            verb = "refuses" if facts.get("store_refuses") else "does not answer"
            empty = facts.get("store_empty")
            return {
                "store_problem": None if why is None else f"the store {verb}: {why}",
                "store_note": None if empty is None else f"{empty}: {EMPTY}",
            }
        time.sleep(POLL_S)


def changed_options(mountpoint: Path, declared: Mapping[str, Any]) -> list[str]:
    """The options that are declared otherwise than a mount has them; none if it does not tell this user its own."""
    facts, _ = _control(mountpoint)
    if facts is None or "options" not in facts or facts.get("fleet_problem"):
        return []
    running = facts["options"]
    differ = {name for name in running.keys() | declared.keys() if running.get(name) != declared.get(name)}
    return sorted(differ - {"allow_empty", "log_file"})  # these depend on who starts it


def _control(mountpoint: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The content of the file ``control`` and the error of reading it.

    A mount that hangs has neither. One that denies this user access, or is not of trimsfs, has no content.
    """
    command: list[str | Path] = ["head", f"--bytes={STATUS_LIMIT}", "--", mountpoint / ".trims/control"]
    try:
        done = child_process.run(command, ANSWER_TIMEOUT_S)
    except HangsError:
        return None, None
    try:
        facts = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        facts = None
    return (facts if isinstance(facts, dict) else None), done.stderr
