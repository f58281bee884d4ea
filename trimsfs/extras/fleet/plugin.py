"""How fleets plug into the core. A mount that belongs to none imports nothing else of this package."""

import importlib
from functools import partial

from trimsfs.cli.diagnosis.checks import Check, ProblemError
from trimsfs.options import MountOptions


def checks(options: MountOptions) -> list[tuple[str, Check]]:
    """The checks of ``trimsfs doctor`` for a mount of a fleet."""
    if options.fleet is None:
        return []
    try:
        checks = importlib.import_module("trimsfs.extras.fleet.checks")  # other mounts do not need it
    except ImportError as error:
        return [("fleet", partial(_fail, f"{error}: pip install 'trimsfs[fleet]'"))]
    return [
        ("fleet stores", checks.stores),
        ("fleet certificate", checks.certificate),
        ("fleet nginx", checks.nginx),
        ("fleet members", checks.members),
    ]


def _fail(problem: str, _: MountOptions) -> str:
    raise ProblemError(problem)
