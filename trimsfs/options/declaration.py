"""How an option is declared: its default and help, its heading, and whether people set it by hand."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pydantic import Field
from pydantic.fields import FieldInfo

Heading = Literal[
    "Store",
    "Credentials",
    "Cache",
    "Memory",
    "Reads",
    "Network",
    "Data integrity",
    "Access",
    "Server",
    "Logging",
    "GPU",
    "Fleet",
]
HEADINGS: tuple[Heading, ...] = get_args(Heading)
"""The headings of ``trimsfs mount --help`` and of docs/configuration.md, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What an option has beside its type, its default and its help.

    Every option can be set in the configuration file and, unless it is a table, by its variable. A *flag* is one that
    people set by hand: the command line takes it too. *metavar* stands for its value if the type does not tell.
    """

    heading: Heading
    flag: bool
    metavar: str | None


def option(
    default: object, heading: Heading, description: str, *, flag: bool = False, metavar: str | None = None
) -> Any:
    """Declare an option as `pydantic.Field` does, with what `Declaration` says."""
    declared = Declaration(heading=heading, flag=flag, metavar=metavar)
    return Field(default, description=description, json_schema_extra=asdict(declared))


def declaration(field: FieldInfo) -> Declaration:
    """What `option` has declared of a field."""
    assert isinstance(field.json_schema_extra, dict)
    return Declaration(**field.json_schema_extra)  # type: ignore[arg-type]
