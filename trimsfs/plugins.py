"""Plugins: how extras plug into the core, which imports none of them; its type checker alone knows some names.

Each extra is listed in the ``PLUGINS`` of `trimsfs.extras` at the points that it adds to. It is imported on use: a
program that asks for no extra loads none, and without that package the core works alone.
"""

import importlib

TYPE_CHECKING = False  # type checkers treat it as true; importing it from typing would slow every start
if TYPE_CHECKING:
    from typing import Any


def plugins(point: str, *, extras: str = "trimsfs.extras") -> dict[str, str]:
    """What is plugged in at a point: by name, a module, or an attribute of one as ``MODULE:ATTRIBUTE``."""
    try:
        table: dict[str, dict[str, str]] = importlib.import_module(extras).PLUGINS
    except ModuleNotFoundError as error:
        if error.name != extras:
            raise
        return {}
    return table.get(point, {})


def plugin(point: str, name: str) -> "Any":
    """What is plugged in at a point under a name. Raises KeyError if there is none, and as `load`."""
    return load(plugins(point)[name])


def load(place: str) -> "Any":
    """What a place of `plugins` names. Raises ImportError where a library is not installed."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
