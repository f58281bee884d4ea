"""The release before this one: its tree and its extensions, built from this repository's history."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import let_in

ROOT = Path(__file__).parents[2]
COMMIT = "6e1dd03b05aaa966f19ffb4c51387231df2a26c8"
"""It stands for the release before this one: none is published. Afterwards, name the tag of the last release here."""
VERSION = "0.1.0"
"""What the tree is made to call itself: it has this one's version, and nobody could tell whose a process is."""
MESSAGES = Path(__file__).with_name("former_messages.json")
"""What its keeper and its servers say to each other, see `tests.kubernetes.former_messages`."""
PROGRAMS = ("mountctl", "trimsfs")
BUILD_TIMEOUT_S = 300


def former_release(directory: Path) -> dict[str, Path]:
    """Build the release in a directory; its programs, by the paths of this tree that they take the place of.

    Skips the test where the history does not reach back so far.
    """
    tree = directory / "former"
    tree.mkdir()
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", COMMIT, *PROGRAMS, "setup.py", "pyproject.toml", "README.md", "LICENSE"],
        capture_output=True,
        check=False,
    )
    if archive.returncode != 0:
        reason = archive.stderr.decode().strip()
        pytest.skip(f"no commit {COMMIT[:8]} here, as in a shallow clone (git fetch --unshallow): {reason}")
    subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
    _run(tree, "setup.py", "-q", "build_ext", "--inplace")
    about = tree / "trimsfs/__init__.py"
    text, lines = about.read_text(), "\n__version__ = "
    before, version, after = text.partition(lines)
    assert version
    about.write_text(f'{before}{lines}"{VERSION}"\n{after.partition(chr(10))[2]}')
    _run(tree, "-m", "compileall", "-q", *PROGRAMS)  # nothing can be written there when it runs
    let_in(tree)
    return {str(ROOT / name): tree / name for name in PROGRAMS}


def _run(tree: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
