"""Tells how a command line starts Python: by which interpreter, with which options, and what it runs."""

import os
from collections.abc import Mapping, Sequence

SCRIPT, MODULE, CODE = "script", "module", "code"
_FLAGS = frozenset("bBdEIOPqRsSu")
_WITH_VALUE = frozenset("WX")
_START = 512


class PlainError(Exception):
    """Why a program is not forked but run as it is: the reason, as an end of "not forked: "."""


class PythonCommand:
    """A Python program: its interpreter's *path* and *options*, and the *arguments* that the program sees.

    *kind* tells what *target* is: a script's path, or what follows ``-m`` or ``-c``. *line* is the whole command line,
    as the kernel starts it: a script that names its interpreter has that in front.
    """

    __slots__ = ("arguments", "kind", "line", "options", "path", "target")

    def __init__(
        self, path: str, options: Sequence[str], kind: str, target: str, arguments: Sequence[str], line: Sequence[str]
    ) -> None:
        self.path = path
        self.options = list(options)
        self.kind = kind
        self.target = target
        self.arguments = list(arguments)
        self.line = list(line)


def parse(command: Sequence[str], environment: Mapping[str, str]) -> PythonCommand:
    """Tell what *command* runs. Raises PlainError for what is no Python program, or cannot be forked."""
    path = _found(command[0], environment)
    line = list(command)
    start = _start(path)
    if start.startswith(b"#!"):
        words = os.fsdecode(start[2:].partition(b"\n")[0]).strip().split(None, 1)
        if words and os.path.basename(words[0]) == "env":
            words = words[1:]  # `env python3`: the interpreter is searched for, as `env` would
        if not words or not _is_python(words[0]):
            raise PlainError(f"{command[0]} is no Python program")
        line = [*words, path, *command[1:]]
        path = _found(words[0], environment)
        start = _start(path)
    if not _is_python(path):
        raise PlainError(f"{command[0]} is no Python program")
    if not start.startswith(b"\x7fELF"):
        raise PlainError(f"{path} is a script around an interpreter: name the interpreter itself")
    return _parsed(path, line)


def _parsed(path: str, line: list[str]) -> PythonCommand:
    rest = line[1:]
    options: list[str] = []
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        for at, letter in enumerate(word[1:], 1):
            value = word[at + 1 :]
            if letter in "mc":
                target = value or (rest.pop(0) if rest else "")
                options += [word[:at]] if at > 1 else []
                if not target:
                    break
                kind = MODULE if letter == "m" else CODE
                return PythonCommand(path, options, kind, target, ["-" + letter, *rest], line)
            if letter in _WITH_VALUE:
                if (value or " ".join(rest[:1])).startswith("importtime"):
                    raise PlainError("-X importtime shows imports")
                options += [word] if value else [word, *rest[:1]]
                del rest[: 0 if value else 1]
                break
            if letter not in _FLAGS:
                raise PlainError(f"option {word} of Python")
        else:
            options.append(word)
    if not rest or rest[0] == "-":
        raise PlainError("the program is read from standard input")
    script = rest[0]
    if not os.path.isfile(script) or not os.access(script, os.R_OK) or script.endswith((".pyc", ".pyz", ".zip")):
        raise PlainError(f"{script} is no script that can be read")
    return PythonCommand(path, options, SCRIPT, script, rest, line)


def _found(name: str, environment: Mapping[str, str]) -> str:
    if "/" in name:
        return name
    for directory in environment.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory or ".", name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise PlainError(f"there is no command {name}")


def _is_python(path: str) -> bool:
    name = os.path.basename(path)
    return name.startswith("python") and not name.removeprefix("python").strip("0123456789.t")


def _start(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_START)
    except OSError as error:
        raise PlainError(f"{path}: {error.strerror}") from error
