"""Installs the import hook: every Python that `trimsfs run` starts runs this before its program.

The interpreter may belong to any environment: this makes ``trimsfs`` importable, but none of its dependencies.
"""

import os  # not pathlib, which would slow every program down
import sys
from importlib.machinery import PathFinder

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(os.path.dirname(_HERE))
_TAIL = _HERE.split(os.sep)[-3:]


class _Trimsfs:
    """Finds ``trimsfs`` when no other finder does."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        return PathFinder.find_spec(name, [os.path.dirname(_PACKAGE)], target) if name == "trimsfs" else None


def _start() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - any interpreter may run this
        print("trimsfs: not used in this program: the client needs Python 3.11", file=sys.stderr)
        return
    sys.meta_path.append(_Trimsfs)
    import trimsfs.client.import_hook  # noqa: PLC0415

    trimsfs.client.import_hook.install()


def _pass_on() -> None:
    """Run the sitecustomize module that this one hides."""
    # Skip the startup directories of other installations: their module would run this one again.
    others = [place for place in sys.path if place.rstrip(os.sep).split(os.sep)[-3:] != _TAIL]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec  # noqa: PLC0415

        spec.loader.exec_module(module_from_spec(spec))


try:
    _start()
except Exception as error:
    print(f"trimsfs: not used in this program: {error!r}", file=sys.stderr)
_pass_on()
