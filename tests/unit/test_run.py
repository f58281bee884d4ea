"""``trimsfs run``: the program is what it was, with trimsfs at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trimsfs
import trimsfs.client
from trimsfs.client import import_hook

TRIMSFS = Path(sys.executable).with_name("trimsfs")
ELSEWHERE = "/usr/bin/python3"


def run(*command: str, python_path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **({} if python_path is None else {"PYTHONPATH": str(python_path)})}
    return subprocess.run(
        [TRIMSFS, "run", *command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_arguments_and_exit_code_are_the_programs() -> None:
    done = run(sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "--help", "-x", "--", "y")
    assert (done.returncode, done.stdout) == (7, "['--help', '-x', '--', 'y']\n")


def test_a_program_that_is_not_there_gives_one_line() -> None:
    done = run("--", "no-such-program")
    assert (done.returncode, done.stderr) == (127, "trimsfs: no-such-program: no such command\n")


def test_a_program_that_cannot_be_run_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "program").write_text("")
    done = run("--", str(tmp_path / "program"))
    assert (done.returncode, done.stderr) == (126, f"trimsfs: {tmp_path}/program: Permission denied\n")


def test_adapters_wait_for_their_framework(tmp_path: Path) -> None:
    (tmp_path / "mxnet.py").write_text("")
    script = "import sys; before = 'trimsfs.extras.mxnet' in sys.modules; import mxnet; print(before)"
    done = run(sys.executable, "-c", script, python_path=tmp_path)
    assert (done.returncode, done.stdout) == (0, "False\n")
    assert "the mxnet adapter cannot be installed" in done.stderr  # it is no MXNet that the adapter knows


def test_the_programs_own_sitecustomize_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('own')")
    done = run(sys.executable, "-c", "print('program')", python_path=tmp_path)
    assert done.stdout.splitlines() == ["own", "own", "program"]  # the first is the command's own Python


def test_one_inside_another_is_as_one(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('own')")
    done = run(str(TRIMSFS), "run", sys.executable, "-c", "print('program')", python_path=tmp_path)
    assert done.stdout.splitlines()[-2:] == ["own", "program"]


@pytest.mark.skipif(not Path(ELSEWHERE).exists(), reason="there is no other Python")
def test_another_python_gets_the_client_and_nothing_else() -> None:
    script = "import sys, trimsfs.client; print('pydantic' in sys.modules, trimsfs.client.__name__)"
    done = run(ELSEWHERE, "-c", script)
    recent = subprocess.run(
        [ELSEWHERE, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True, check=True
    )
    if recent.stdout == "True\n":
        assert (done.returncode, done.stdout) == (0, "False trimsfs.client\n"), done.stderr
    else:
        assert "needs Python 3.11" in done.stderr


def test_what_the_package_has_comes_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no model")
    model = trimsfs.open(tmp_path / "file")
    with pytest.raises(trimsfs.FormatError, match=f"^{tmp_path}/file: unknown format"):
        model.numpy()
    assert trimsfs.client.FormatError is trimsfs.FormatError


def test_installing_twice_is_as_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    import_hook.install()
    once = len(sys.meta_path)
    import_hook.install()
    assert len(sys.meta_path) == once
