"""Installs the adapter of a framework when a program imports the framework.

Every Python that `trimsfs run` starts runs this first, so it imports next to nothing.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from trimsfs.plugins import load, plugins

ADAPTERS = plugins("adapters")
"""For each framework, the function that installs its adapter."""
VERBOSE = "TRIMSFS_VERBOSE"
"""If this environment variable is set, the client logs to standard error what it does with each model."""


def install() -> None:
    """Install the adapters of imported frameworks now, and of others when the program imports them."""
    if os.environ.get(VERBOSE):
        _log_to_stderr()
    for framework in ADAPTERS:
        if framework in sys.modules:
            _adapt(framework)
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def _log_to_stderr() -> None:
    import logging  # noqa: PLC0415 - slow to import, and few programs need it

    client = logging.getLogger("trimsfs")
    client.setLevel(logging.DEBUG)
    if not client.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("trimsfs: %(message)s"))
        client.addHandler(handler)


def _adapt(framework: str) -> None:
    try:
        load(ADAPTERS[framework])()
    except Exception:  # a failed adapter must not stop the program
        import logging  # noqa: PLC0415

        logging.getLogger(__name__).exception(
            "the %s adapter cannot be installed: models are copied, as without trimsfs", framework
        )


class _Finder:
    """Finds a framework by the usual path, and wraps its loader to install the adapter afterwards."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in ADAPTERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Runs another loader, then installs the adapter. A base class from ``importlib.abc`` would be slow to import."""

    def __init__(self, loader: object) -> None:
        self._loader = loader

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)  # type: ignore[attr-defined]
        _adapt(module.__name__)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # `create_module`, and the methods of resource readers
