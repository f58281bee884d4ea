"""The specs of models as devices: their names, where container engines look for them, and the end of one.

See `mountctl.containers.cdi`, which writes them.
"""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path

from trimsfs.mountinfo import escape, trimsfs_at

WHOLE, GPU = "all", "gpu"
DEFAULT_DIRECTORY = Path("/var/run/cdi")
NAME_LIMIT = 64


def device_name(model: str) -> str:
    """A valid CDI name, unique for each model: `:` replaces `/`, and a hash after `::` replaces invalid characters.

    A name depends only on its model, so no model can take the name of another.
    """
    if len(model) <= NAME_LIMIT and model not in {WHOLE, GPU} and all(map(_plain, model.split("/"))):
        return model.replace("/", ":")
    readable = re.sub(r"[^A-Za-z0-9]+", "-", model)[:NAME_LIMIT].strip("-") or "model"
    return f"{readable}::{short_hash(model, 32)}"


def _plain(part: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?", part) is not None


def short_hash(text: str, digits: int) -> str:
    """The first hexadecimal digits of a text's hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def default_output(mountpoint: Path) -> Path:
    """The default path of a mount's spec, where engines look for it."""
    name = escape(mountpoint)
    if not _plain(name) or len(name) > NAME_LIMIT:
        name = device_name(name).replace("::", "-")
    return DEFAULT_DIRECTORY / f"trimsfs-{name}.json"


def remove(mountpoint: Path) -> None:
    """Remove the spec at the default path of a mount that has ended, unless it is by now of another at its place."""
    if trimsfs_at(mountpoint) is not None:
        return
    with suppress(OSError, ValueError, LookupError, TypeError):
        output = default_output(mountpoint)
        if json.loads(output.read_text())["containerEdits"]["env"] == [f"TRIMSFS_MODELS={mountpoint}"]:
            output.unlink()
