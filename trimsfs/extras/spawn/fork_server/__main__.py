"""Starts a fork server: ``python OPTIONS fork_server/__main__.py LISTENER READY GENERATION SETTINGS PADDING``.

LISTENER and READY are descriptors: a listening socket, and a pipe to write to once the server serves, or -1. SETTINGS
is a file, or JSON text itself. PADDING makes room for the command lines that forks show in ps.
"""

import os
import sys
from importlib.machinery import PathFinder

_SPAWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PLACE = os.path.dirname(os.path.dirname(os.path.dirname(_SPAWN)))


class _Trimsfs:
    """Finds this installation's ``trimsfs``, whatever the interpreter's environment has."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        return PathFinder.find_spec(name, [_PLACE], target) if name == "trimsfs" else None


if not sys.flags.safe_path:
    del sys.path[0]  # the directory of this file
sys.meta_path.insert(0, _Trimsfs)
from trimsfs.extras.spawn.fork_server.main import main  # noqa: E402
from trimsfs.extras.spawn.fork_server.program import run  # noqa: E402

sys.meta_path.remove(_Trimsfs)
for _name in [name for name in sys.modules if name.partition(".")[0] == "trimsfs"]:
    del sys.modules[_name]  # a program that imports it gets that of its own environment
_program = main(sys.argv[1:])
if _program is not None:
    try:
        run(_program.order)
    finally:
        _program.tell_imports()
