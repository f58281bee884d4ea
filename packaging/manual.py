"""Writes man pages and completions, from the commands themselves: ``python packaging/manual.py DIRECTORY``.

Makes DIRECTORY/man/man1/trimsfs.1 and so on, and DIRECTORY/completions/{bash,zsh,fish}. SOURCE_DATE_EPOCH dates them.
"""

import inspect
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete
from pydantic import BaseModel

from mountctl.commands.declared_mounts import DIRECTORY
from mountctl.commands.main import main as mountctl
from trimsfs import __version__, errors
from trimsfs.cli.fstab import main as fstab
from trimsfs.cli.main import main as trimsfs
from trimsfs.cli.mount_options import help_text, is_flag, metavar
from trimsfs.command_group import CommandGroup
from trimsfs.exit_codes import EXIT_CODES
from trimsfs.options import DEFAULT_CONFIG, SCALARS, MountOptions
from trimsfs.options.schema import TABLES, AccessRule, Tenant
from trimsfs.options.sources import MOUNTPOINT
from trimsfs.options.store_settings import StoreTable

ABOUT = "trimsfs: models of a bucket as files"
CONFIGURATION = "trimsfs.toml"
SHELLS: dict[str, tuple[type[ShellComplete], str]] = {
    "bash": (BashComplete, "{}"),
    "zsh": (ZshComplete, "_{}"),
    "fish": (FishComplete, "{}.fish"),
}
"""How each shell completes, and the name of the file that it looks for."""


def pages() -> dict[str, str]:
    """All man pages by their names, such as ``trimsfs.1``."""
    found = {}
    for group in (trimsfs, mountctl):
        assert isinstance(group, CommandGroup)
        found[f"{group.name}.1"] = "\n".join(_group(group))
        for name, command in _shown(group):
            title = f"{group.name}-{name}"
            found[f"{title}.1"] = "\n".join(_command(title, 1, command, f"{group.name} {name}", [f"{group.name}(1)"]))
    see = ["trimsfs-mount(1)", f"{CONFIGURATION}(5)", "mount(8)", "fstab(5)"]
    found["mount.trimsfs.8"] = "\n".join(_command("mount.trimsfs", 8, fstab, "mount.trimsfs", see))
    found[f"{CONFIGURATION}.5"] = "\n".join(_configuration())
    return found


def _shown(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is not None and not command.hidden:
            yield name, command


def _group(group: CommandGroup) -> Iterator[str]:
    """The page of a program with verbs."""
    assert group.name is not None
    yield from _head(group.name, 1, group.get_short_help_str(200))
    yield from (
        ".SH SYNOPSIS",
        f".B {group.name}",
        ".I COMMAND",
        "[\\fIOPTIONS\\fR] [\\fIARGUMENTS\\fR]",
        ".SH DESCRIPTION",
    )
    yield from _text(group.help or "")
    commands = dict(_shown(group))
    for title, names in group.sections.items():
        yield f".SH {_escaped(title.upper())}"
        for name in names:
            if name in commands:
                yield from (".TP", f".BR {_escaped(f'{group.name}-{name}')} (1)")
                yield from _text(commands[name].get_short_help_str(200))
    yield ".SH OPTIONS"
    yield from _records(group)
    yield ".SH EXIT STATUS"
    codes = dict[int, list[str]]()
    for kind, code in EXIT_CODES.items():
        meaning = inspect.getdoc(getattr(errors, kind, KeyboardInterrupt)) or ""
        codes.setdefault(code, []).append(meaning.partition(".")[0] + ".")
    for code, meanings in {0: ["Done."], 1: ["Anything else."], **codes}.items():
        yield from (".TP", f".B {code}", _escaped(" ".join(meanings)))
    yield from _examples(group)
    yield from _see_also([f"{group.name}-{name}(1)" for name in commands] + [f"{CONFIGURATION}(5)", "mount.trimsfs(8)"])


def _command(title: str, section: int, command: click.Command, typed: str, see: Sequence[str]) -> Iterator[str]:
    """The page of a command that is *typed* so."""
    yield from _head(title, section, command.get_short_help_str(200))
    yield ".SH SYNOPSIS"
    pieces = command.collect_usage_pieces(click.Context(command))
    yield f"\\fB{_escaped(typed)}\\fR {_escaped(' '.join(pieces))}"
    yield ".SH DESCRIPTION"
    yield from _text(command.help or "")
    yield ".SH OPTIONS"
    yield from _records(command)
    if isinstance(command, click.Group):
        for name, part in _shown(command):
            yield f".SH {_escaped(f'{typed} {name}'.upper())}"
            yield from _text(part.help or "")
            yield from _records(part)
    yield from _examples(command)
    yield from _see_also(see)


def _head(title: str, section: int, summary: str) -> Iterator[str]:
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    yield f'.TH "{_escaped(title.upper())}" {section} "{date}" "trimsfs {__version__}" "{ABOUT}"'
    yield from (".SH NAME", f"{_escaped(title)} \\- {_escaped(summary.rstrip('.'))}")


def _records(command: click.Command) -> Iterator[str]:
    """The options of a command, as its help has them."""
    context = click.Context(command, info_name=command.name, help_option_names=["-h", "--help"])
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            yield from (".TP", f".B {_escaped(record[0])}")
            yield from _text(record[1])


def _examples(command: click.Command) -> Iterator[str]:
    lines = (command.epilog or "").splitlines()[2:]
    if lines:
        yield from (".SH EXAMPLES", ".nf", *(_escaped(line.strip()) for line in lines), ".fi")


def _see_also(names: Iterable[str]) -> Iterator[str]:
    yield ".SH SEE ALSO"
    *most, last = [f".BR {_escaped(name.partition('(')[0])} ({name.partition('(')[2]}" for name in names]
    yield from (*(f"{name} ," for name in most), last)


def _configuration() -> Iterator[str]:
    """The page of the configuration file, from the schema of the options."""
    yield from _head(CONFIGURATION, 5, "configuration files of trimsfs")
    yield from (".SH SYNOPSIS", ".nf", _escaped(str(DEFAULT_CONFIG)), _escaped(f"{DIRECTORY}/NAME.toml"), ".fi")
    yield ".SH DESCRIPTION"
    yield from _text(
        f"TOML files. {DEFAULT_CONFIG} has options of all mounts. A file in {DIRECTORY} declares a mount for "
        f"`mountctl`: it has a {MOUNTPOINT}, and options of this mount, which win.\n\n"
        "Environment variables, such as TRIMSFS_CACHE_SIZE, win over files, and the command line over both. "
        'Sizes are numbers of bytes, or text such as "10GiB". Times are seconds.'
    )
    yield ".SH OPTIONS"
    yield from (".TP", f'.BI {MOUNTPOINT} " = " DIRECTORY', f"Where to mount. Only in {DIRECTORY}.")
    for name in SCALARS:
        value = "true|false" if is_flag(name) else metavar(name)
        yield from (".TP", f'.BI {name} " = " {_escaped(value)}')
        yield from _text(help_text(name))
    tables: tuple[type[BaseModel], ...] = (AccessRule, Tenant, StoreTable)
    for (name, table), model in zip(TABLES.items(), tables, strict=True):
        yield f".SH [[{_escaped(table.upper())}]]"
        yield from _text(f"{MountOptions.model_fields[name].description} {model.__doc__}")
        yield from (".PP", "Keys:", ", ".join(f"\\fB{_escaped(field)}\\fR" for field in model.model_fields) + ".")
    yield from (".SH EXAMPLES", ".nf")
    example = (Path(__file__).parent / "mounts.d/models.toml").read_text()
    yield from (*map(_escaped, example.splitlines()), ".fi")
    yield from _see_also(["trimsfs-mount(1)", "mountctl-up(1)"])


def _text(text: str) -> Iterator[str]:
    """Paragraphs, in which `` `code` `` is bold."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield re.sub(r"`([^`]+)`", r"\\fB\1\\fR", _escaped(" ".join(paragraph.split())))


def _escaped(text: str) -> str:
    """Text that means itself to roff, with dashes that can be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    return re.sub(r"(?m)^(?=[.'])", r"\\&", text)


def completions() -> dict[str, str]:
    """The completion scripts by their paths."""
    found = {}
    for shell, (kind, name) in SHELLS.items():
        for group in (trimsfs, mountctl):
            assert group.name is not None
            script = kind(group, {}, group.name, f"_{group.name.upper()}_COMPLETE")
            found[f"{shell}/{name.format(group.name)}"] = script.source_template % script.source_vars()
    return found


def write(directory: Path) -> None:
    """Write all below a directory."""
    files = {f"man/man{name[-1]}/{name}": text for name, text in pages().items()}
    files |= {f"completions/{name}": text for name, text in completions().items()}
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip("\n") + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
