"""The status of a mount for users who may not ask its keeper: what the mount itself shows to everybody."""

import json
import subprocess
from pathlib import Path
from typing import Any

HIDDEN, NOT_KEPT = "hidden", "not kept"
"""The states of a mount that denies this user access, and of one that a server serves without a keeper."""


def public_status(mountpoint: Path, *, timeout_s: float) -> dict[str, Any]:
    """The status of a mount, from its server. A child process asks: one that waits for a mount cannot be killed."""
    command = ["cat", "--", str(mountpoint / ".trims/control")]
    process = subprocess.Popen(command, env={"LC_ALL": "C"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        text, message = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"state": "hanging"}
    if process.returncode == 0:
        facts = json.loads(text)
        told = ("server_pid", "keeper_pid", "restarts", "log_file")
        found = {"state": "serving"} | {name: facts[name] for name in told if name in facts}
        kept = facts.get("keeper_problem") is None
        return found if kept else found | {"state": NOT_KEPT, "error": facts["keeper_problem"]}
    return {"state": HIDDEN if b"Permission denied" in message else "dead"}
