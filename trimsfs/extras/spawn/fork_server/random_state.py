"""The random numbers of a fork: as unpredictable as those of a new process, or as fixed as an import has made them.

MXNet's generator starts with the same seed in every process, so it stays as it is.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _numpy_state(module: Any) -> Any:
    kind, words, *rest = module.get_state()
    return kind, words.tobytes(), rest


def _torch_seed(module: Any) -> Any:
    return module.initial_seed()  # drawing leaves it: a model's initial weights may be drawn


_STATES: dict[str, Callable[[Any], Any]] = {"numpy.random": _numpy_state, "torch": _torch_seed}


class RandomState:
    """The states of libraries' generators when they were imported, to tell whether an import has used one since."""

    def __init__(self) -> None:
        self._random = random.getstate()
        self._first: dict[str, Any] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the state of each generator as soon as its library has been imported."""
        finder = _Finder(self._first)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)

    def used(self) -> str | None:
        """A generator that an import has seeded or drawn from; None if there is none.

        A fork could neither go on with it, as its draws would be those of the next fork, nor make it anew.
        """
        if random.getstate() != self._random:
            return "random"
        return next((name for name, state in self._first.items() if _STATES[name](sys.modules[name]) != state), None)


class _Finder:
    def __init__(self, first: dict[str, Any]) -> None:
        self._first = first

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _STATES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._first)  # type: ignore[assignment]
        return spec


class _Loader:
    """Runs another loader, and then notes the state of the generator."""

    def __init__(self, loader: Any, first: dict[str, Any]) -> None:
        self._loader = loader
        self._first = first

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        name = module.__name__
        self._first[name] = _STATES[name](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def renew() -> None:
    """In a fork: seed the generators as a new process would. Python's own does so by itself."""
    if module := sys.modules.get("numpy.random"):
        module.seed()
    if module := sys.modules.get("torch"):
        module.default_generator.seed()
