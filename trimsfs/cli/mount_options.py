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
from trimsfs.options import DEFAULT_CONFIG, ENVIRONMENT_PREFIX, SCALARS, MountOptions, flag, load_options

_METAVARS = {
    "store": "URL",
    "endpoint_url": "URL",
    "cache_dir": "DIR",
    "cache_size": "SIZE",
    "host_size": "SIZE",
    "gpu_memory": "SHARE",
    "gpu_headroom": "SIZE",
    "fetch_processes": "N",
    "min_free": "SIZE",
    "memory_limit": "SIZE",
    "log_file": "FILE",
    "web_identity_token_file": "FILE",
    "sse_c_key_file": "FILE",
    "signing_key": "FILE",
    "role_arn": "ARN",
    "scrub_rate": "SIZE",
    "trace_opens": "SHARE",
    "uid": "UID",
    "gid": "GID",
    "control_gid": "GID",
    "server_user": "USER",
    "metrics_listen": "ADDRESS",
    "mode": "OCTAL",
    "dir_mode": "OCTAL",
    "fleet": "NAME",
    "fleet_members": "LIST|FILE|DNS",
    "fleet_listen": "ADDRESS:PORT",
    "fleet_ca": "FILE",
    "fleet_cert": "FILE",
    "fleet_key": "FILE",
    "fleet_upload_limit": "SIZE",
}


def mount_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with the mount options; it receives them as one argument, ``options``.

    An argument ``source`` of the command is another way to name the store. Raises ConfigurationError.
    """

    def wrapped(config: tuple[Path, ...], source: str | None = None, **arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in SCALARS}
        given = {name: value for name, value in given.items() if value is not None}
        if source is not None and given.setdefault("store", source) != source:
            raise ConfigurationError(f"store {source} and option --store {given['store']}: give one of them")
        command(options=load_options(given, configs=config), **arguments)

    wrapped.__name__ = command.__name__
    wrapped.__doc__ = command.__doc__
    decorated: Callable[..., None] = wrapped
    for name in reversed(SCALARS):
        field = MountOptions.model_fields[name]
        option = flag(name)
        shown = (
            "" if field.default in {None, False} or name == "mode" else f"  [default: {_shown(name, field.default)}]"
        )
        attributes: dict[str, Any] = {"default": None, "help": f"{field.description}{shown}"}
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
        help=f"TOML file with any of these options; of several, later ones win.  [default: {DEFAULT_CONFIG}]",
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
    return _METAVARS.get(name, _metavar(MountOptions.model_fields[name].annotation))


def _metavar(annotation: Any) -> str:
    return "|".join(_choices(annotation)) or ("S" if annotation is float else "TEXT")


def _choices(annotation: Any) -> tuple[str, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def _shown(name: str, default: object) -> str:
    if _METAVARS.get(name) == "SIZE" and isinstance(default, int):
        return f"{default >> 20}MiB"
    return str(default)
