"""Man pages and completions are those of the commands, and the programs that read them find no fault."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mountctl.commands.main import main as mountctl
from tests.support.mounts import TRIMSFS
from tests.support.terminal import terminal
from trimsfs.cli.fstab import main as fstab
from trimsfs.cli.main import main as trimsfs
from trimsfs.exit_codes import EXIT_CODES
from trimsfs.options import MountOptions
from trimsfs.options.schema import AccessRule, Tenant
from trimsfs.options.store_settings import StoreTable

ROOT = Path(__file__).parents[2]
BIN = str(Path(TRIMSFS).parent)


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all pages and completions, as of the first of January 2026."""
    directory = tmp_path_factory.mktemp("manual")
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1767225600", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "packaging/manual.py", directory], cwd=ROOT, env=environment, check=True)
    return directory


def commands() -> Iterator[tuple[str, click.Command]]:
    """Each page of a command, below man/."""
    for group in (trimsfs, mountctl):
        yield f"man1/{group.name}.1", group
        for name in group.list_commands(click.Context(group)):
            command = group.get_command(click.Context(group), name)
            assert command is not None
            if not command.hidden:
                yield f"man1/{group.name}-{name}.1", command
    yield "man8/mount.trimsfs.8", fstab


def text_of(page: Path) -> str:
    """A page as people read it, on long lines."""
    command = ["mandoc", "-Tascii", "-Owidth=1000", str(page)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(".\b", "", text)  # what is bold is written twice


def test_pages_are_as_man_wants_them(manual: Path) -> None:
    pages = sorted((manual / "man").rglob("*.?"))
    assert {f"{page.parent.name}/{page.name}" for page in pages} == {
        *(page for page, _ in commands()),
        "man5/trimsfs.toml.5",
    }
    checkers: list[list[str | Path]] = [  # `man --warnings` runs groff for each page, with fewer warnings
        ["groff", "-t", "-man", "-ww", "-Kutf8", "-Tutf8", "-z", *pages],
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", pages[-1]],
        ["mandoc", "-Tlint", "-Wwarning", *pages],
    ]
    for checker in checkers:
        done = subprocess.run(checker, capture_output=True, check=False)
        assert (done.returncode, done.stderr.decode()) == (0, ""), checker
    assert '.TH "TRIMSFS" 1 "2026-01-01"' in (manual / "man/man1/trimsfs.1").read_text()


def test_each_verb_and_option_is_in_its_page(manual: Path) -> None:
    for page, command in commands():
        text = text_of(manual / "man" / page)
        parts = [command, *(getattr(command, "commands", {}).values() if page.endswith("jobs.1") else ())]
        shown = [option for part in parts for option in part.params if not getattr(option, "hidden", False)]
        options = {name for option in shown for name in (*option.opts, *option.secondary_opts)}
        assert {name for name in options if name.startswith("-") and not re.search(rf"\s{name}\b", text)} == set(), page
        help_text = " ".join((command.help or "").replace("`", "").split())
        assert help_text[:60] in " ".join(text.split()), page
        assert all(line.strip() in text for line in (command.epilog or "").splitlines()[2:]), page


def test_each_verb_and_exit_code_is_in_the_page_of_its_program(manual: Path) -> None:
    for group in (trimsfs, mountctl):
        text = text_of(manual / f"man/man1/{group.name}.1")
        verbs = [page.removeprefix("man1/").removesuffix(".1") for page, _ in commands() if f"/{group.name}-" in page]
        assert {verb for verb in verbs if f"{verb}(1)" not in text} == set()
        codes = text.partition("EXIT STATUS")[2].partition("\nEXAMPLES")[0]
        assert {code for code in EXIT_CODES.values() if not re.search(rf"(?m)^ +{code} ", codes)} == set()
        assert re.search(r"(?m)^ +13 +The name does not exist", codes)


def test_each_option_of_a_file_is_in_the_page_of_the_file(manual: Path) -> None:
    text = text_of(manual / "man/man5/trimsfs.toml.5")
    keys = {"mountpoint", *MountOptions.model_fields} - {"access", "tenants", "stores"}
    assert {key for key in keys if f" {key} = " not in text} == set()
    for title, model in (("[[ACCESS]]", AccessRule), ("[[TENANTS]]", Tenant), ("[[STORE]]", StoreTable)):
        section = text.partition(f"\n{title}")[2].partition("\n[[")[0]
        assert {key for key in model.model_fields if key not in section} == set()


def test_bash_completes(manual: Path) -> None:
    script = "source $1; COMP_WORDS=(trimsfs um); COMP_CWORD=1; _trimsfs_completion trimsfs; echo ${COMPREPLY[*]}"
    assert completed(["bash", "-c", script, "bash", str(manual / "completions/bash/trimsfs")]) == "umount\n"


def test_fish_completes(manual: Path) -> None:
    script = "source $argv[1]; complete -C 'mountctl upg'"
    command = ["fish", "--no-config", "-c", script, str(manual / "completions/fish/mountctl.fish")]
    assert completed(command).split()[0] == "upgrade"


def completed(command: list[str]) -> str:
    path = f"{BIN}:{os.environ['PATH']}"
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True)
    return done.stdout


def test_zsh_completes(manual: Path, tmp_path: Path) -> None:
    (tmp_path / ".zshrc").write_text(
        f"path=({BIN} $path); fpath=({manual}/completions/zsh $fpath)\n"
        "autoload -Uz compinit; compinit -u -D; PS1='ready '\n"
    )
    with terminal(["env", f"ZDOTDIR={tmp_path}", "zsh", "--no-globalrcs"]) as shell:
        shell.wait_for("ready")
        shell.press("trimsfs um", "Tab")
        shell.wait_for("trimsfs umount")
