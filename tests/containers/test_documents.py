"""What is said of containers is so."""

from pathlib import Path

from mountctl.containers.hook import GPU, MODELS, MOUNT
from tests.containers.engines import mountctl

TEXT = (Path(__file__).parents[2] / "docs/containers.md").read_text()
COMMANDS = {"attach", "detach", "cdi", "oci-hook", "share"}


def test_every_exit_code_command_and_annotation_is_described() -> None:
    described = {name for name in COMMANDS if f"mountctl {name}" in TEXT}
    assert {code for code in (0, 1, 2, 4, 10, 11, 13, 15, 16) if f"| {code} |" not in TEXT} == set()
    assert described == COMMANDS - {"oci-hook"}
    assert {name for name in (MODELS, MOUNT, GPU) if f"| `{name}` |" not in TEXT} == set()


def test_help_needs_no_mount() -> None:
    for command in COMMANDS:
        done = mountctl(command, "--help")
        assert (done.returncode, done.stdout.startswith("Usage: mountctl")) == (0, True), command
