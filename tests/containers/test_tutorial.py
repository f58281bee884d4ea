"""The tutorial is followed to its end, with other directories and an image that is here."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.containers.engines import Podman, apart
from tests.support.mounts import trimsfs

TUTORIAL = (Path(__file__).parents[2] / "docs/tutorial.md").read_text()
TIMEOUT_S = 200
IMAGE = "docker.io/library/debian:13"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def script(directory: Path, image: str) -> str:
    """The tutorial's commands, with a directory and an image of the tests."""
    text = "".join(re.findall(r"^```sh\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL))
    assert IMAGE in text
    text = text.replace(IMAGE, image)
    text = text.replace("umount", "umount --lazy")  # containers of other tests have copies of all mounts
    text = text.replace("mount /srv/store /models", f"mount /srv/store /models --cache-dir {directory}/cache")
    return re.sub(r"(?<![\w./])/(models|srv/store)\b", rf"{directory}/\1", text)


def test_the_tutorial_leads_where_it_says(podman: Podman, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for above in (tmp_path, *tmp_path.parents[:2]):
        above.chmod(0o755)
    program = shutil.which("podman")
    assert program is not None
    (programs / "podman").write_text(f'#!/bin/sh\nexec {shlex.join(apart(program))} "$@"\n')
    (programs / "podman").chmod(0o755)
    environment = {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", **podman.environment}
    try:
        done = subprocess.run(
            ["sh", "-euc", script(tmp_path, podman.image)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    finally:
        podman("rm", "--force", "--time", "0", "one", "two")
        trimsfs("umount", "--lazy", tmp_path / "models")

    assert done.returncode == 0, done.stderr
    digests = re.findall(r"^([0-9a-f]{64}) ", done.stdout, re.MULTILINE)
    assert (len(digests), len(set(digests))) == (4, 1)
    assert "trimsfs_fetch_fetched_bytes_total 6.710886" in done.stdout
    assert re.search(r"llama +1 +67\.1 MB +100% +100%", done.stdout)
    assert "restarted 1 time" in done.stdout
