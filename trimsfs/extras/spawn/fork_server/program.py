"""Runs a program in this process as ``python SCRIPT``, ``python -m MODULE`` or ``python -c CODE`` would."""

import builtins
import io
import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

SCRIPT, MODULE = "script", "module"


def run(order: dict[str, Any]) -> None:
    """Run the program, up to where Python would begin to end itself.

    Raises what ends Python with its exit status. A traceback has been printed by then, without frames of this module.
    """
    sys.argv[:] = order["arguments"]
    sys.orig_argv[:] = order["line"]
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    target = order["target"]
    if not sys.flags.safe_path:
        sys.path.insert(0, _first_path(order["kind"], target))
    try:
        if order["kind"] == MODULE:
            runpy._run_module_as_main(target)  # type: ignore[attr-defined] # what `python -m` calls
        else:
            exec(_code(order["kind"], target, main), main.__dict__)  # noqa: S102 - the caller's own program
    except SystemExit:
        raise
    except BaseException as error:
        _report(error)
        raise


def _first_path(kind: str, target: str) -> str:
    if kind == SCRIPT:
        return os.path.dirname(os.path.realpath(target))
    return os.getcwd() if kind == MODULE else ""


def _code(kind: str, target: str, main: ModuleType) -> CodeType:
    if kind != SCRIPT:
        return compile(target, "<string>", "exec", dont_inherit=True)
    path = os.path.join(os.getcwd(), target)  # Python does not normalise it
    main.__file__ = path
    main.__dict__["__cached__"] = None
    main.__loader__ = SourceFileLoader("__main__", path)
    with io.open_code(path) as file:
        source = file.read()
    return compile(source, path, "exec", dont_inherit=True)


def _report(error: BaseException) -> None:
    """Print the traceback as Python would, and keep it from printing another."""
    trace = error.__traceback__
    own = {__file__}
    while trace is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    error.__traceback__ = trace
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    sys.excepthook(type(error), error, trace)
    sys.excepthook = _nothing


def _nothing(*_: object) -> None:
    pass
