"""Turns the schema of mount options into options of a command."""

import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from trimsfs.command_group import complete_path
from trimsfs.errors import ConfigurationError
from trimsfs.options import (
    DEFAULT_CONFIG,
    ENVIRONMENT_PREFIX,
    FLAGS,
    FORMER,
    SCALARS,
    MountOptions,
    flag,
    load_options,
)
from trimsfs.options.declaration import HEADINGS
from trimsfs.options.schema import DECLARATIONS

_GENERAL = "General"


class MountCommand(click.Command):
    """A command that takes the mount options: its help has them below their headings."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by heading, in columns that are the same below all."""
        sections = dict[str, list[tuple[str, str]]]()
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            if record is not None:
                known = DECLARATIONS.get(parameter.name or "")
                sections.setdefault(_GENERAL if known is None else known.heading, []).append(record)
        widest = formatter.width // 3
        width = max(len(name) for records in sections.values() for name, _ in records if len(name) <= widest)
        for heading in (_GENERAL, *HEADINGS):
            if heading in sections:
                with formatter.section(heading):
                    rows = [(name.ljust(width), text) for name, text in sections[heading]]
                    formatter.write_dl(rows, col_max=width)


def mount_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with the mount options; it receives them as one argument, ``options``.

    Those that are no flags are taken too, hidden, so that `load_options` refuses them and tells where to set them.
    An argument ``source`` of the command is another way to name the store. Raises ConfigurationError.
    """

    def wrapped(config: tuple[Path, ...], source: str | None = None, **arguments: Any) -> None:
        given = {name: value for name in (*SCALARS, *FORMER) if (value := arguments.pop(name)) is not None}
        if source is not None and given.setdefault("store", source) != source:
            raise ConfigurationError(f"store {source} and option --store {given['store']}: give one of them")
        command(options=load_options(given, configs=config), **arguments)

    wrapped.__name__ = command.__name__
    wrapped.__doc__ = command.__doc__
    decorated: Callable[..., None] = wrapped
    for name in FORMER:
        decorated = click.option(flag(name), name, hidden=True)(decorated)
    for name in reversed(SCALARS):
        option = flag(name)
        attributes: dict[str, Any] = {"default": None, "help": help_text(name), "hidden": name not in FLAGS}
        if is_flag(name):
            option = f"{option}/--no-{option[2:]}"
        else:
            attributes["metavar"] = metavar(name)
            attributes["shell_complete"] = _complete
        decorated = click.option(option, name, **attributes)(decorated)
    return click.option(
        "--config",
        type=click.Path(dir_okay=False, path_type=Path),
        multiple=True,
        envvar=f"{ENVIRONMENT_PREFIX}CONFIG",
        help=f"TOML file; of several, later ones win.  [default: {DEFAULT_CONFIG}]",
    )(decorated)


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the value of an option: one of its choices, or a path."""
    assert parameter.name is not None
    if metavar(parameter.name) in {"FILE", "DIR"}:
        return complete_path(context, parameter, incomplete)
    choices = _choices(MountOptions.model_fields[parameter.name].annotation)
    return [CompletionItem(choice) for choice in choices if choice.startswith(incomplete)]


def is_flag(name: str) -> bool:
    """Whether an option takes no value."""
    return _holds(MountOptions.model_fields[name].annotation, bool)


def _holds(annotation: Any, kind: type) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_holds(part, kind) for part in typing.get_args(annotation))
    return annotation is kind


def metavar(name: str) -> str:
    """What stands for the value of an option."""
    return DECLARATIONS[name].metavar or "|".join(_choices(MountOptions.model_fields[name].annotation)) or "TEXT"


def help_text(name: str) -> str:
    """What the help says of an option: its description, and its default if that is a value."""
    field = MountOptions.model_fields[name]
    if field.default in {None, False} or name == "eviction":
        return str(field.description)
    return f"{field.description}  [default: {shown(name, field.default)}]"


def _choices(annotation: Any) -> tuple[str, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def shown(name: str, default: object) -> str:
    """A default as people write it."""
    if metavar(name) == "OCTAL":
        return f"{default:04o}"
    if metavar(name) == "SIZE" and isinstance(default, int):
        return f"{default >> 30}GiB" if default % (1 << 30) == 0 else f"{default >> 20}MiB"
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)
