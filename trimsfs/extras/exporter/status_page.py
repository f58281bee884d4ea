"""What the status page shows of all mounts, as JSON."""

import json
import time
from collections.abc import Sequence
from typing import Any

from trimsfs import __version__
from trimsfs.cli.control_reader import PROBLEMS
from trimsfs.extras.exporter.history import PLOTTED, History
from trimsfs.extras.exporter.merged_metrics import Families, total
from trimsfs.processes import title_of

MOST_MODELS = 200
"""How many models of a mount are listed: those that are open, and then those with the most uses."""
MOST_USERS = 20
NUMBERS = {
    "disk_used": "trimsfs_disk_used_bytes",
    "disk_budget": "trimsfs_disk_budget_bytes",
    "memory_used": "trimsfs_host_used_bytes",
    "memory_budget": "trimsfs_host_budget_bytes",
    "open": "trimsfs_files_open_handles",
    "fetched": "trimsfs_fetch_fetched_bytes_total",
    "fetch_rate": "trimsfs_fetch_rate",
    "in_flight": "trimsfs_fetch_in_flight",
    "waiting": "trimsfs_fetch_waiting",
    "failed_chunks": "trimsfs_fetch_failed_chunks_total",
    "requests": "trimsfs_store_requests_total",
    "failed_attempts": "trimsfs_store_failed_attempts_total",
    "restarts": "trimsfs_server_restarts_total",
    "saved": "trimsfs_model_saved_bytes",
}
"""Metrics of a mount on the page; the sum where one has labels."""


def status(scraped: Sequence[tuple[dict[str, Any], Families | None]], history: History, *, whole: bool) -> bytes:
    """All mounts, from what the scraper has told of each and its metrics. *whole*: who has models open is known."""
    mounts = [_sound(result, families, history) for result, families in scraped]
    document = {"version": __version__, "time": time.time(), "whole": whole, "plotted": list(PLOTTED), "mounts": mounts}
    return json.dumps(document).encode()


def _sound(result: dict[str, Any], families: Families | None, history: History) -> dict[str, Any]:
    """What is shown of a mount; without what it tells itself if JSON has no such numbers, or is too deep."""
    try:
        mount = _mount(result, families, history)
        json.dumps(mount, allow_nan=False)
    except (ValueError, RecursionError):
        return _mount(result | {"answers": {}, "error": "what it tells cannot be shown"}, None, History())
    return mount


def _mount(result: dict[str, Any], families: Families | None, history: History) -> dict[str, Any]:
    answers = result["answers"]
    control = _json(answers.get("control"))
    try:
        models = _models(_json(answers.get("models")).get("models") or [], answers.get("users") or [])
        waits = _waits(control.get("waits") or [])
    except (AttributeError, KeyError, TypeError, ValueError):
        models, waits = {"models": [], "more_models": 0}, []  # a server that tells nonsense
    numbers = {name: total(families, metric) for name, metric in NUMBERS.items()} if families is not None else {}
    return {
        "mountpoint": result["mountpoint"],
        "store": result["store"],
        "error": result["error"],
        "hidden": result["hidden"],
        "version": control.get("version"),
        "started": control.get("started"),
        "problems": [control[name] for what in PROBLEMS if control.get(name := f"{what}_problem")],
        "numbers": numbers,
        "waits": waits,
        **models,
        "history": history.of(result["mountpoint"]),
    }


def _waits(waits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which programs wait for which paths, the longest first."""
    longest = sorted(waits, key=lambda wait: -float(wait["seconds"]))[:MOST_USERS]
    return [
        {"program": title_of(int(wait["thread"])), "path": str(wait["path"]), "seconds": float(wait["seconds"])}
        for wait in longest
    ]


def _json(text: str | None) -> dict[str, Any]:
    """A control file's answer; nothing if it is not there, or no object."""
    try:
        document = json.loads(text or "{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _models(files: list[dict[str, Any]], users: list[dict[str, Any]]) -> dict[str, Any]:
    """The models of a mount by use, as `trimsfs ls` has them: directories at its top, and files there."""
    models: dict[str, dict[str, Any]] = {}
    by_path = {file["path"]: file["path"].partition("/")[0] for file in files}
    for file in files:
        name = by_path[file["path"]]
        empty = {"model": name, "files": 0, "size": 0, "disk": 0, "memory": 0, "gpu": 0, "open": 0, "uses": 0}
        model = models.setdefault(name, empty | {"pinned": False, "last_used": 0, "users": []})
        model["files"] += 1
        model["size"] += file["size"]
        model["disk"] += file["residency"]["disk"]
        model["memory"] += file["residency"]["host"] or 0
        model["gpu"] += sum((file["residency"].get("gpu") or {}).values())
        model["open"] += file["open"]
        model["uses"] += file["uses"]
        model["pinned"] |= file["pinned"]
        model["last_used"] = max(model["last_used"], file["last_used"] or 0)
    shown = sorted(models.values(), key=lambda model: (-model["open"], -model["uses"], model["model"]))[:MOST_MODELS]
    for user in users:
        for name in {opened for path in user["paths"] if (opened := _model_at(path, by_path)) is not None}:
            models[name]["users"].append(
                {"pid": user["pid"], "program": user["program"], "container": user["container"]}
            )
    for model in shown:
        model["others"] = max(0, len(model["users"]) - MOST_USERS)
        model["users"] = model["users"][:MOST_USERS]
    return {"models": shown, "more_models": len(models) - len(shown)}


def _model_at(path: str, models: dict[str, str]) -> str | None:
    """The model of the file at a path. Containers know a mount by other paths than this host."""
    parts = path.removesuffix(" (deleted)").strip("/").split("/")
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((models[tail] for tail in tails if tail in models), None)
