"""Reads a pickle without running it: calls become descriptions.

By the opcodes of ``pickletools``. It imports nothing that the pickle names, and hashes none of its values.
"""

import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimsfs.formats.table import MOST_TENSORS, FormatError

MEMO_LIMIT = 1 << 32
MOST_OPCODES = 28 * MOST_TENSORS
"""PyTorch writes some 3.5 million into 16 MiB, the longest pickle that is read. Each takes some 90 bytes at most."""
LONGEST_NAME = 256
"""Characters of a global's name: the parser knows none of a quarter of this."""


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a global, such as ``torch.FloatStorage``, which is not imported."""

    text: str


@dataclass(slots=True, eq=False)
class Call:
    """The description of a call, which is not made."""

    function: Any
    arguments: Any


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """A persistent id: an object that the writer stored outside of the pickle."""

    identity: Any


@dataclass(slots=True, eq=False)
class Items:
    """A list, set or dictionary: its elements, or its pairs of keys and values."""

    pairs: bool
    elements: Sequence[Any] = ()


def describe(data: bytes) -> Any:
    """Decode a pickle into plain values, tuples, `Items`, `Name`, `Call` and `Reference`.

    Raises FormatError for an invalid pickle, and for one of more than MOST_OPCODES.
    """
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == MOST_OPCODES:
                raise ValueError(f"more than {MOST_OPCODES} opcodes")
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    # genops and the steps below raise one of these for invalid opcodes and arguments.
    except (ValueError, IndexError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise FormatError(f"invalid pickle: {error}") from None
    return value


class _Machine:
    """The pickle machine: its stack and memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:  # noqa: PLR0912, PLR0915 - a case for each opcode
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
            return
        match name:
            case "BINPUT" | "LONG_BINPUT" | "PUT" | "MEMOIZE":
                self._remember(len(self._memo) if argument is None else argument)
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self._recall(argument))
            case "MARK":
                self._marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[name])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(self._pop_mark()))
            case "REDUCE" | "NEWOBJ":
                stack.append(_called(*self._pop(2)))
            case "NEWOBJ_EX":
                stack.append(Call(*self._pop(3)[:2]))
            case "GLOBAL":
                stack.append(Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(_global(*self._pop(2)))
            case "PERSID":
                stack.append(Reference(argument))
            case "BINPERSID":
                stack.append(Reference(self._pop(1)[0]))
            case "EMPTY_DICT":
                stack.append(Items(pairs=True))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append(Items(pairs=False))
            case "DICT":
                stack.append(Items(pairs=True, elements=_paired(self._pop_mark())))
            case "LIST" | "FROZENSET":
                stack.append(Items(pairs=False, elements=self._pop_mark()))
            case "SETITEM":
                self._extend(_paired(self._pop(2)), pairs=True)
            case "SETITEMS":
                self._extend(_paired(self._pop_mark()), pairs=True)
            case "APPEND":
                self._extend(self._pop(1), pairs=False)
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_mark(), pairs=False)
            case "POP" | "BUILD":  # the state of an object is not interpreted
                self._pop(1)
            case "POP_MARK":
                self._pop_mark()
            case "DUP":
                stack.append(self._top())
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise ValueError(f"unknown opcode {name}")

    def _pop(self, count: int) -> list[Any]:
        """The last *count* values above the last mark."""
        keep = len(self.stack) - count
        if keep < (self._marks[-1] if self._marks else 0):
            raise ValueError("too few values")
        taken = self.stack[keep:]
        del self.stack[keep:]
        return taken

    def _pop_mark(self) -> list[Any]:
        """All values above the last mark; removes the mark."""
        begin = self._marks.pop()
        taken = self.stack[begin:]
        del self.stack[begin:]
        return taken

    def _top(self) -> Any:
        (value,) = self._pop(1)
        self.stack.append(value)
        return value

    def _extend(self, elements: list[Any], *, pairs: bool) -> None:
        container = self._top()
        if isinstance(container, Items) and container.pairs == pairs:
            if isinstance(container.elements, list):
                container.elements.extend(elements)
            else:
                container.elements = elements  # a list only now: one in each empty container would take most memory
        elif not isinstance(container, Call):  # the result of a call may be a container
            raise ValueError("elements for a value that is not a container")

    def _remember(self, index: int) -> None:
        if not 0 <= index < MEMO_LIMIT:
            raise ValueError(f"memo index {index}")
        self._memo[index] = self._top()

    def _recall(self, index: int) -> Any:
        if index not in self._memo:
            raise ValueError(f"memo {index} is empty")
        return self._memo[index]


def _called(function: Any, arguments: Any) -> "Items | Call":
    dictionary = isinstance(function, Name) and function.text in _DICTIONARIES
    return Items(pairs=True) if dictionary else Call(function, arguments)


def _global(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        return Name("")
    # Both may come from the memo: a few bytes of the pickle would make a long string each time.
    if len(module) + len(name) > LONGEST_NAME:
        raise ValueError("the name of a global is too long")
    return Name(f"{module}.{name}")


_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_DICTIONARIES = frozenset({"collections.OrderedDict", "collections.defaultdict"})


def _paired(values: list[Any]) -> list[Any]:
    """Pairs of alternating keys and values."""
    return list(zip(values[::2], values[1::2], strict=True))
