"""What is said of containers is so."""

from pathlib import Path

import click

from mountctl.cli import main
from mountctl.containers.commands import register
from mountctl.containers.errors import ERRORS
from mountctl.containers.hook import MODELS, MOUNT
from tests.containers.engines import mountctl

TEXT = (Path(__file__).parents[2] / "docs/containers.md").read_text()


def test_every_exit_code_command_and_annotation_is_described() -> None:
    group = click.Group()
    register(group)
    assert {code for code in (0, *(error.exit_code for error in ERRORS)) if f"| {code} |" not in TEXT} == set()
    assert {name for name in group.commands if name != "oci-hook" and f"mountctl {name}" not in TEXT} == set()
    assert f"| `{MODELS}` |" in TEXT
    assert f"| `{MOUNT}` |" in TEXT
    assert group.commands.items() <= main.commands.items()


def test_help_needs_no_mount() -> None:
    for command in ("attach", "detach", "cdi", "oci-hook", "share"):
        done = mountctl(command, "--help")
        assert (done.returncode, done.stdout.startswith("Usage: mountctl")) == (0, True), command
