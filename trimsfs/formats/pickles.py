"""Reads a pickle without running it: calls become descriptions.

By the opcodes of ``pickletools``. It imports nothing that the pickle names, and hashes none of its values.
"""

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self._tuple(_TUPLES[name])
        else:
            step = self._STEPS.get(name)
            if step is None:
                raise ValueError(f"unknown opcode {name}")
            step(self, argument)

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

    def _nothing(self, _: Any) -> None:
        pass

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self.stack))

    def _drop(self, _: Any) -> None:
        self._pop(1)

    def _drop_mark(self, _: Any) -> None:
        self._pop_mark()

    def _duplicate(self, _: Any) -> None:
        self.stack.append(self._top())

    def _global(self, argument: str) -> None:
        self.stack.append(Name(argument.replace(" ", ".")))

    def _stack_global(self, _: Any) -> None:
        module, name = self._pop(2)
        text = ""
        if isinstance(module, str) and isinstance(name, str):
            # Both may come from the memo: a few bytes of the pickle would make a long string each time.
            if len(module) + len(name) > LONGEST_NAME:
                raise ValueError("the name of a global is too long")
            text = f"{module}.{name}"
        self.stack.append(Name(text))

    def _call(self, _: Any) -> None:
        function, arguments = self._pop(2)
        dictionary = isinstance(function, Name) and function.text in _DICTIONARIES
        self.stack.append(Items(pairs=True) if dictionary else Call(function, arguments))

    def _call_with_names(self, _: Any) -> None:
        function, arguments, _names = self._pop(3)
        self.stack.append(Call(function, arguments))

    def _state(self, _: Any) -> None:
        self._pop(1)  # the state of an object is not interpreted

    def _reference(self, argument: Any) -> None:
        self.stack.append(Reference(argument))

    def _reference_on_stack(self, _: Any) -> None:
        self.stack.append(Reference(self._pop(1)[0]))

    def _tuple(self, count: int) -> None:
        self.stack.append(tuple(self._pop(count)))

    def _tuple_of_mark(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_mark()))

    def _empty_list(self, _: Any) -> None:
        self.stack.append(Items(pairs=False))

    def _empty_dict(self, _: Any) -> None:
        self.stack.append(Items(pairs=True))

    def _list_of_mark(self, _: Any) -> None:
        self.stack.append(Items(pairs=False, elements=self._pop_mark()))

    def _dict_of_mark(self, _: Any) -> None:
        self.stack.append(Items(pairs=True, elements=_paired(self._pop_mark())))

    def _append(self, _: Any) -> None:
        (value,) = self._pop(1)
        self._extend([value], pairs=False)

    def _append_mark(self, _: Any) -> None:
        self._extend(self._pop_mark(), pairs=False)

    def _set_item(self, _: Any) -> None:
        self._extend(_paired(self._pop(2)), pairs=True)

    def _set_items(self, _: Any) -> None:
        self._extend(_paired(self._pop_mark()), pairs=True)

    def _extend(self, elements: list[Any], *, pairs: bool) -> None:
        container = self._top()
        if isinstance(container, Items) and container.pairs == pairs:
            if isinstance(container.elements, list):
                container.elements.extend(elements)
            else:
                container.elements = elements  # a list only now: one in each empty container would take most memory
        elif not isinstance(container, Call):  # the result of a call may be a container
            raise ValueError("elements for a value that is not a container")

    def _remember(self, argument: int | None) -> None:
        index = len(self._memo) if argument is None else argument
        if not 0 <= index < MEMO_LIMIT:
            raise ValueError(f"memo index {index}")
        self._memo[index] = self._top()

    def _recall(self, argument: int) -> None:
        if argument not in self._memo:
            raise ValueError(f"memo {argument} is empty")
        self.stack.append(self._memo[argument])

    _STEPS: ClassVar[dict[str, Callable[["_Machine", Any], None]]] = {
        "PROTO": _nothing,
        "FRAME": _nothing,
        "STOP": _nothing,
        "MARK": _mark,
        "POP": _drop,
        "POP_MARK": _drop_mark,
        "DUP": _duplicate,
        "GLOBAL": _global,
        "STACK_GLOBAL": _stack_global,
        "REDUCE": _call,
        "NEWOBJ": _call,
        "NEWOBJ_EX": _call_with_names,
        "BUILD": _state,
        "PERSID": _reference,
        "BINPERSID": _reference_on_stack,
        "TUPLE": _tuple_of_mark,
        "EMPTY_LIST": _empty_list,
        "EMPTY_SET": _empty_list,
        "EMPTY_DICT": _empty_dict,
        "LIST": _list_of_mark,
        "FROZENSET": _list_of_mark,
        "DICT": _dict_of_mark,
        "APPEND": _append,
        "APPENDS": _append_mark,
        "ADDITEMS": _append_mark,
        "SETITEM": _set_item,
        "SETITEMS": _set_items,
        "PUT": _remember,
        "BINPUT": _remember,
        "LONG_BINPUT": _remember,
        "MEMOIZE": _remember,
        "GET": _recall,
        "BINGET": _recall,
        "LONG_BINGET": _recall,
    }


_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DICTIONARIES = frozenset({"collections.OrderedDict", "collections.defaultdict"})


def _paired(values: list[Any]) -> list[Any]:
    """Pairs of alternating keys and values."""
    return list(zip(values[::2], values[1::2], strict=True))
