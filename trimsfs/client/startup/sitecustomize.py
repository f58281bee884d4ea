"""Run by every Python that `trimsfs run` starts, before its program: see ``trimsfs.client.hook``.

The interpreter may be any, with libraries of its own: only ``trimsfs`` itself is made importable.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]


def _start() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - it is not ours that this is run by
        print("trimsfs: not used: its client needs Python 3.11", file=sys.stderr)
        return
    if importlib.util.find_spec("trimsfs") is None:
        spec = importlib.util.spec_from_file_location(
            "trimsfs", _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["trimsfs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    importlib.import_module("trimsfs.client.hook").install()


def _pass_on() -> None:
    """Run the sitecustomize that this one hides."""
    # Also those of other installations, each of which would find this one again.
    others = [place for place in sys.path if Path(place).parts[-3:] != Path(__file__).parts[-4:-1]]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


try:
    _start()
except Exception as error:
    print(f"trimsfs: not used: {error!r}", file=sys.stderr)
_pass_on()
