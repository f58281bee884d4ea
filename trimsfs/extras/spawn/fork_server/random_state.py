"""The random numbers of a fork: as unpredictable as those of a new process, or as fixed as an import has made them.

MXNet's generator starts with the same seed in every process, so it stays as it is.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from itertools import count
from types import ModuleType
from typing import Any


def _numpy_state(module: Any) -> Any:
    kind, words, *rest = module.get_state()
    return kind, words.tobytes(), rest


def _torch_seed(module: Any) -> Any:
    return module.initial_seed()  # drawing leaves it: a model's initial weights may be drawn


_KEY_BYTES = 32
_STATES: dict[str, Callable[[Any], Any]] = {"numpy.random": _numpy_state, "torch": _torch_seed}


def _number_links(module: Any) -> None:
    module._id_generator = count(random.getrandbits(24))


def _vary_pauses(module: Any) -> None:
    numpy = module.np
    for value in module.retry.__defaults__:
        if isinstance(value, numpy.ndarray):
            value[:] = numpy.logspace(-1, 1, len(value)) * numpy.random.rand(len(value))


_DRAWS: dict[str, Callable[[Any], None]] = {
    "rich.style": _number_links,
    "jax._src.clusters.k8s_cluster": _vary_pauses,
}
"""Modules that draw when they are imported, and what does that once more: all that they drew is another then."""
_drawn: list[str] = []
"""Those that did so, and that forks have draw again."""


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

    def restore(self) -> None:
        """In a fork, whose generator Python has seeded: have it as before."""
        random.setstate(self._random)

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
        if name not in _STATES and name not in _DRAWS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._first)  # type: ignore[assignment]
        return spec


class _Loader:
    """Runs another loader, and then notes the state of the generator, or undoes what a fork draws anew."""

    def __init__(self, loader: Any, first: dict[str, Any]) -> None:
        self._loader = loader
        self._first = first

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        name = module.__name__
        before = _states() if name in _DRAWS else None
        self._loader.exec_module(module)
        if before is None:
            self._first[name] = _STATES[name](module)
        else:
            of_python, of_numpy = before
            _undo((of_python, of_numpy or self._first.get("numpy.random")), name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _undo(before: Any, name: str) -> None:
    """Have generators in the state *before* the import of a module, if that drew what forks can draw again, no more."""
    after = _states()
    _restore(before)
    with suppress(AttributeError, TypeError):  # another version
        _DRAWS[name](sys.modules[name])
        if _states() == after != before:
            _restore(before)
            _drawn.append(name)
            return
    _restore(after)


def _states() -> Any:
    """The states of Python's generator and of NumPy's, if that is there."""
    module = sys.modules.get("numpy.random")
    return random.getstate(), module and _numpy_state(module)


def _restore(states: Any) -> None:
    random.setstate(states[0])
    if states[1]:
        kind, words, rest = states[1]
        numpy = sys.modules["numpy"]
        numpy.random.set_state((kind, numpy.frombuffer(words, numpy.uint32), *rest))


def renew() -> None:
    """In a fork: seed the generators as a new process would, and draw anew. Python's own is seeded by itself.

    The key by which programs of multiprocessing know each other is drawn anew, too.
    """
    if module := sys.modules.get("multiprocessing.process"):
        module.current_process().authkey = os.urandom(_KEY_BYTES)
    if module := sys.modules.get("numpy.random"):
        module.seed()
    if module := sys.modules.get("torch"):
        module.default_generator.seed()
    for name in _drawn:
        _DRAWS[name](sys.modules[name])
