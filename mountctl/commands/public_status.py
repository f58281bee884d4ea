"""What a mount itself shows to everybody: its status for users who may not ask its keeper, and that of its store."""

import json
import time
from pathlib import Path
from typing import Any

from mountctl.linux import child_process
from mountctl.linux.child_process import HangsError

HIDDEN, NOT_KEPT = "hidden", "not kept"
"""The states of a mount that denies this user access, and of one that a server serves without a keeper."""
POLL_S = 0.1
STATUS_LIMIT = 1 << 20
EMPTY = "there is nothing under it: check the spelling if you expect objects"


def public_status(mountpoint: Path, *, timeout_s: float) -> dict[str, Any]:
    """The status of a mount, from its server."""
    facts, message = _control(mountpoint, timeout_s)
    if message is None:
        return {"state": "hanging"}
    if facts is not None:
        told = ("server_pid", "keeper_pid", "restarts", "log_file")
        found = {"state": "serving"} | {name: facts[name] for name in told if name in facts}
        kept = facts.get("keeper_problem") is None
        return found if kept else found | {"state": NOT_KEPT, "error": facts["keeper_problem"]}
    return {"state": HIDDEN if "Permission denied" in message else "dead"}


def store_status(mountpoint: Path, *, timeout_s: float, patience_s: float = 0.0) -> dict[str, str | None]:
    """The status of a mount's store: ``store_problem``, why it does not answer or what it refuses, and ``store_note``,
    that there is nothing; None where there is nothing to tell. Empty for a mount that denies this user access.

    A server that has just taken over asks its store first: that is waited for, for *patience_s*.
    """
    deadline = time.monotonic() + patience_s
    while True:
        facts, message = _control(mountpoint, timeout_s)
        if message is None:
            return {"store_problem": f"{mountpoint} does not answer: see `mountctl logs {mountpoint}`"}
        if facts is None:
            return {}
        if facts.get("store_known", True) or time.monotonic() >= deadline:  # older servers do not send it
            why: str | None = facts.get("store_problem")
            verb = "refuses" if facts.get("store_refuses") else "does not answer"
            empty = facts.get("store_empty")
            return {
                "store_problem": None if why is None else f"the store {verb}: {why}",
                "store_note": None if empty is None else f"{empty}: {EMPTY}",
            }
        time.sleep(POLL_S)


def _control(mountpoint: Path, timeout_s: float) -> tuple[dict[str, Any] | None, str | None]:
    """The content of the file ``control`` and the error of reading it; neither of a mount that hangs, and no content of
    a mount that is none of ours."""
    command: list[str | Path] = ["head", f"--bytes={STATUS_LIMIT}", "--", mountpoint / ".trims/control"]
    try:
        done = child_process.run(command, timeout_s)
    except HangsError:
        return None, None
    try:
        facts = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        facts = None
    return (facts if isinstance(facts, dict) else None), done.stderr
