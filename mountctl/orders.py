"""What a keeper's order may become while its file system is mounted."""

from typing import Any

FIXED = ("mountpoint", "source", "allow_other", "foreground")
"""What cannot be changed while it is mounted, beside the cache directory."""


def refusal(before: dict[str, Any], given: Any) -> dict[str, Any] | None:
    """Why what an operator has given cannot take the place of the order of before, if it cannot."""
    match given:
        case {"server": [str(), *_], "options": {"cache_dir": str(), "log_file": str()}}:
            pass
        case _:
            return {"error": "not an order"}
    changed = [name for name in FIXED if given.get(name) != before[name]]
    if given["options"]["cache_dir"] != before["options"]["cache_dir"]:
        changed.append("cache_dir")
    if not changed:
        return None
    names = ", ".join(changed).replace("source", "store")
    error = f"{names} cannot be changed while it is mounted: take it down, and up again"
    return {"error": error, "kind": "ConfigurationError"}
