"""Adapters are installed the moment their framework is imported, and not before."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

log = logging.getLogger(__name__)

ADAPTERS = {"mxnet": "trimsfs.client.mxnet"}
"""The module that has ``install``, by the framework's own."""


def install() -> None:
    """Install the adapters of frameworks that are there, and of others when they come."""
    for framework in ADAPTERS:
        if framework in sys.modules:
            _adapt(framework)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _adapt(framework: str) -> None:
    try:
        importlib.import_module(ADAPTERS[framework]).install()
    except Exception:  # the program is to run in any case, if without us
        log.exception("%s is used as it is", framework)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a framework where it is, and has its loader install the adapter at the end."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in ADAPTERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _adapt(module.__name__)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # readers of resources ask for more
