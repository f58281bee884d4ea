"""What ``trimsfs`` and ``mountctl`` share: subcommands, the completion of paths, and standard output."""

import importlib
import io
import keyword
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from click.shell_completion import CompletionItem

from trimsfs.mountinfo import mounts


class OutputError(Exception):
    """Standard output cannot be written. Not an OSError: handlers for other files must not catch it."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output: {cause.strerror}")
        self.nobody_reads = isinstance(cause, BrokenPipeError)


class _Output(io.FileIO):
    """Standard output. Raises OutputError, which ends the command."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from error


class CommandGroup(click.Group):
    """Subcommands that are imported on use, and listed by *sections*: under each title, the module of each verb.

    *synonyms* are other names of subcommands. If standard output fails, a command ends as those of coreutils do.
    """

    def __init__(
        self,
        *,
        sections: Mapping[str, Mapping[str, str]],
        synonyms: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.sections = sections
        self._homes = {name: home for verbs in sections.values() for name, home in verbs.items()}
        self._synonyms = synonyms or {}

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(self._homes)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        name = self._synonyms.get(name, name)
        if name not in self._homes:
            return None
        attribute = name.replace("-", "_") + "_" * keyword.iskeyword(name)
        command: click.Command = getattr(importlib.import_module(self._homes[name]), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches  # noqa: PLC0415 - only who misspells waits for it

            close = get_close_matches(args[0], [*self._homes, *self._synonyms], n=1)
            if not close:
                raise
            raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", ctx) from None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self._homes))
        for title, verbs in self.sections.items():
            commands = [(name, self.get_command(context, name)) for name in verbs]
            limit = formatter.width - width - 6
            rows = [
                (name.ljust(width), command.get_short_help_str(limit))
                for name, command in commands
                if command is not None and not command.hidden
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def main(self, *arguments: Any, **settings: Any) -> Any:
        with _writing(self.name):
            return super().main(*arguments, **settings)


def examples(*lines: str) -> str:
    """The end of a command's help: what to type."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


@contextmanager
def _writing(program: str | None) -> Iterator[None]:
    """End as coreutils do if standard output fails: by SIGPIPE if nobody reads it, else with an error message."""
    if sys.stdout is not sys.__stdout__:  # a test has replaced it
        yield
        return
    if sys.stdout is None:  # closed: make writes fail
        os.dup2(os.open(os.devnull, os.O_RDONLY), 1)
    encoding, errors = ("utf-8", "strict") if sys.stdout is None else (sys.stdout.encoding, sys.stdout.errors)
    raw = _Output(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=raw.isatty())
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard what is still buffered
        if error.nobody_reads:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
        click.echo(f"{program}: {error}", err=True)
        sys.exit(1)


def complete_path(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a path: click's own type for paths calls stat, which a mount may never answer."""
    return [CompletionItem(incomplete, type="file")]


def complete_mounted(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a path on a mount: mount points first, and then what lies below."""
    mountpoints = sorted({str(mount.mountpoint) for mount in mounts()} - {incomplete})
    matching = [CompletionItem(path) for path in mountpoints if path.startswith(incomplete)]
    return matching or complete_path(context, parameter, incomplete)
