"""What all commands have in common: output that cannot be written, and what shells complete."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import click
import pytest
from click.shell_completion import CompletionItem, ShellComplete
from click.testing import CliRunner

from mountctl.commands import main as mountctl
from tests.support.mounts import MOUNTCTL, TRIMSFS
from trimsfs import command_group
from trimsfs.cli.main import main
from trimsfs.command_group import CommandGroup
from trimsfs.mountinfo import Mount

GROUPS: list[CommandGroup] = [main, mountctl.main]
VERBS = [(TRIMSFS, "warm", "--help"), (MOUNTCTL, "--version")]


@pytest.mark.parametrize("command", VERBS)
@pytest.mark.parametrize(("output", "cause"), [("/dev/full", "No space left on device"), ("&-", "Bad file descriptor")])
def test_output_that_cannot_be_written_is_told_in_a_line(command: tuple[str, ...], output: str, cause: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" >{output}', "sh", *command], capture_output=True, text=True, timeout=60, check=False
    )
    program = Path(command[0]).name
    assert (done.returncode, done.stderr) == (1, f"{program}: standard output: {cause}\n")


@pytest.mark.parametrize("command", VERBS)
def test_a_command_whose_output_nobody_reads_ends_silently(command: tuple[str, ...]) -> None:
    receiver, sender = os.pipe()
    os.close(receiver)
    try:
        done = subprocess.run(command, stdout=sender, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(sender)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The mount points of two mounts, and a directory in which one is declared."""
    found = [
        Mount(number=number, parent=1, mountpoint=Path(path), device="0:1", kind="fuse.trimsfs", source="s3://b")
        for number, path in enumerate(("/mnt/models", "/mnt/other"))
    ]
    monkeypatch.setattr(command_group, "mounts", lambda: found)
    (tmp_path / "prod.toml").write_text('mountpoint = "/mnt/models"\n')
    monkeypatch.setenv("TRIMSFS_MOUNTS_DIR", str(tmp_path))
    return tmp_path


def completed(group: CommandGroup, *words: str) -> list[tuple[str, str]]:
    """What a shell is told of the last word: kinds and values."""
    found: list[CompletionItem] = ShellComplete(group, {}, "program", "_PROGRAM_COMPLETE").get_completions(
        list(words[:-1]), words[-1]
    )
    return [(item.type, item.value) for item in found]


def test_verbs_mount_points_and_paths_are_completed(mounted: Path) -> None:
    assert completed(main, "un") == [("plain", "unpin")]
    assert completed(main, "refresh", "") == [("plain", "/mnt/models"), ("plain", "/mnt/other")]
    assert completed(main, "ls", "/mnt/o") == [("plain", "/mnt/other")]
    assert completed(main, "ls", "--mount", "/mnt/m") == [("plain", "/mnt/models")]
    assert completed(main, "warm", "/mnt/models/r") == [("file", "/mnt/models/r")]
    assert completed(main, "umount", "/mnt/models") == [("file", "/mnt/models")]
    assert completed(main, "mount", "s3://b", "/mn") == [("file", "/mn")]
    assert completed(main, "mount", "--cache-dir", "/va") == [("file", "/va")]
    assert completed(main, "doctor", "--cold-open", "") == [("plain", "auto"), ("plain", "wait"), ("plain", "stream")]
    assert completed(main, "mount", "--digests", "w") == [("plain", "wait")]
    assert completed(main, "mount", "--cache-size", "1") == []


def test_names_of_declared_mounts_are_completed(mounted: Path) -> None:
    assert completed(mountctl.main, "status", "p")[0] == ("plain", "prod")
    assert completed(mountctl.main, "restart", "/mnt/m") == [("plain", "/mnt/models")]


def test_the_shell_is_told_by_the_command_itself() -> None:
    asked = {"_TRIMSFS_COMPLETE": "bash_complete", "COMP_WORDS": "trimsfs mount /nonexist", "COMP_CWORD": "2"}
    for environment, answer in ((asked, ""), (asked | {"COMP_WORDS": "trimsfs ref", "COMP_CWORD": "1"}, "refresh")):
        done = subprocess.run(
            [TRIMSFS], env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, answer in done.stdout, done.stderr) == (0, True, "")


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_help_lists_each_verb_once_under_a_title(group: CommandGroup) -> None:
    lines = CliRunner().invoke(group, ["--help"]).output.splitlines()
    context = click.Context(group)
    shown = [name for name in group.list_commands(context) if not command_of(group, name).hidden]

    assert [line.split()[0] for line in lines if re.match("  [a-z]", line) and line.split()[0] in shown] == shown
    assert [f"{title}:" in lines for title in group.sections] == [True] * len(group.sections)
    assert not any(line.endswith("...") for line in lines[1:])


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_the_help_of_each_verb_ends_with_an_example_that_it_accepts(group: CommandGroup) -> None:
    for name in group.list_commands(click.Context(group)):
        output = CliRunner().invoke(group, [name, "--help"]).output
        given = [shlex.split(re.split(" [<|]", line)[0]) for line in output.partition("Examples:\n")[2].splitlines()]
        own = [words[words.index(name) + 1 :] for words in given if f"{group.name} {name}" in " ".join(words)]

        assert own, f"{group.name} {name} --help has no example"
        for words in own:
            command_of(group, name).make_context(name, words)


@pytest.mark.parametrize(
    ("group", "verb", "meant"),
    [(main, "psuh", "push"), (main, "unmuont", "unmount"), (mountctl.main, "stauts", "status"), (main, "xyzzy", None)],
    ids=lambda given: str(getattr(given, "name", given)),
)
def test_a_misspelt_verb_is_told_with_the_nearest(group: CommandGroup, verb: str, meant: str | None) -> None:
    done = CliRunner().invoke(group, [verb])
    remedy = "" if meant is None else f" Did you mean '{meant}'?"
    assert (done.exit_code, done.output.splitlines()[-1]) == (2, f"Error: No such command '{verb}'.{remedy}")


def command_of(group: CommandGroup, name: str) -> click.Command:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return command
