"""Adapters are installed the moment their framework is imported, and not before.

This is run at the start of every Python of `trimsfs run`, and imports next to nothing.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ADAPTERS = {"mxnet": "trimsfs.client.mxnet"}
"""The module that has ``install``, by the framework's own."""
VERBOSE = "TRIMSFS_VERBOSE"
"""A variable of the environment: when it is set, standard error tells what becomes of each model."""


def install() -> None:
    """Install the adapters of frameworks that are there, and of others when they come."""
    if os.environ.get(VERBOSE):
        _tell()
    for framework in ADAPTERS:
        if framework in sys.modules:
            _adapt(framework)
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def _tell() -> None:
    import logging  # noqa: PLC0415 - programs that do not ask for it do not wait for it

    client = logging.getLogger("trimsfs.client")
    client.setLevel(logging.DEBUG)
    if not client.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("trimsfs: %(message)s"))
        client.addHandler(handler)


def _adapt(framework: str) -> None:
    try:
        importlib.import_module(ADAPTERS[framework]).install()
    except Exception:  # the program is to run in any case, if without us
        import logging  # noqa: PLC0415

        logging.getLogger(__name__).exception("%s is used as it is", framework)


class _Finder:
    """Finds a framework where it is, and has its loader install the adapter at the end."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in ADAPTERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Another loader, and the adapter after it. ``importlib.abc`` would cost every program more than all of this."""

    def __init__(self, loader: object) -> None:
        self._loader = loader

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)  # type: ignore[attr-defined]
        _adapt(module.__name__)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # `create_module`, and what readers of resources ask for
