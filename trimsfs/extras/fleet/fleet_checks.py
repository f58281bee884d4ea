"""Which checks ``trimsfs doctor`` makes for a mount of a fleet."""

import importlib
from functools import partial

from trimsfs.cli.diagnosis.checks import Check, ProblemError
from trimsfs.options import MountOptions


def checks(options: MountOptions) -> list[tuple[str, Check]]:
    """The checks of ``trimsfs doctor`` for a mount of a fleet."""
    if options.fleet is None:
        return []
    try:
        member_checks = importlib.import_module("trimsfs.extras.fleet.member_checks")  # other mounts do not need it
    except ImportError as error:
        return [("fleet", partial(_fail, f"{error}: pip install 'trimsfs[fleet]'"))]
    return [
        ("fleet stores", member_checks.stores),
        ("fleet certificate", member_checks.certificate),
        ("fleet nginx", member_checks.nginx),
        ("fleet members", member_checks.members),
    ]


def _fail(problem: str, _: MountOptions) -> str:
    raise ProblemError(problem)
