"""What is imported before a fork, and what must not be."""

import os
import sys
import time
import venv
from pathlib import Path

import pytest

from tests.support.fork_servers import ForkServers
from tests.support.mounts import wait_until

REPOSITORY = Path(__file__).parents[2]
UNFIT = {
    "import threading, time; threading.Thread(target=time.sleep, args=(99,), name='naps', daemon=True).start()": (
        "it starts threads (naps)"
    ),
    "print('hello')": "it prints when it is imported",
    "import random; random.seed(1)": "it seeds random, or draws from it, when it is imported",
    "import random; random.random()": "it seeds random, or draws from it, when it is imported",
    "import numpy; numpy.random.rand()": "it seeds numpy.random, or draws from it, when it is imported",
    "import os; os.chdir('/tmp')": "it changes the working directory",
    "import subprocess; p = subprocess.Popen(['sleep', '3'])": "it starts a process",
    "import mmap; m = mmap.mmap(-1, 4096)": "it has memory that all forks would share and could write",
    "raise SystemExit(3)": "its import failed: SystemExit: 3",
    "import no_such_module": "its import failed: ModuleNotFoundError: No module named 'no_such_module'",
}


@pytest.mark.parametrize("text", UNFIT)
def test_a_module_that_no_fork_should_have_is_left_out_by_name(servers: ForkServers, tmp_path: Path, text: str) -> None:
    (tmp_path / "unfit.py").write_text(text)
    (tmp_path / "fit.py").write_text("WORD = 'fit'")
    script = tmp_path / "program.py"
    script.write_text("import sys; print('fit' in sys.modules, 'unfit' in sys.modules)")
    done = servers.run(sys.executable, script, options=("--preload", "unfit,fit"))
    assert done.stdout == "True False\n"
    assert done.stderr.startswith(f"trimsfs: unfit is not preloaded: {UNFIT[text]}")
    assert f"unfit is left out: {UNFIT[text]}" in servers.command("--list").stdout


def test_a_module_whose_import_failed_is_tried_again_by_the_next_server(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text("open('data')")
    script = tmp_path / "program.py"
    script.write_text("import sys; print('late' in sys.modules)")
    assert servers.run(sys.executable, script, options=("--preload", "late"), cwd=tmp_path).stdout == "False\n"
    (tmp_path / "late.py").write_text("")
    servers.command("--stop")
    wait_until(lambda: not servers.pids())
    assert servers.run(sys.executable, script, options=("--preload", "late"), cwd=tmp_path).stdout == "True\n"


def test_a_module_is_left_out_although_no_file_can_say_so(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text("print('noisy')")
    (tmp_path / "loud.py").write_text("print('loud')")
    script = tmp_path / "program.py"
    script.write_text("import os, sys; print('noisy' in sys.modules, any('TRIMSFS_SPAWN_L' in v for v in os.environ))")
    more = {"XDG_CACHE_HOME": "/dev/null"}
    done = servers.run(sys.executable, script, options=("--preload", "noisy,loud"), environment=more)
    assert done.stdout == "False False\n"
    assert [line.split(" is ")[0] for line in done.stderr.splitlines()] == ["trimsfs: noisy", "trimsfs: loud"]


def test_what_a_program_imported_is_there_for_the_next(servers: ForkServers, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    (tmp_path / "own.py").write_text("")
    script.write_text(
        "import sys; print('sqlite3' in sys.modules, 'own' in sys.modules); import sqlite3, own, unittest.mock"
    )
    assert servers.run(sys.executable, script).stdout == "False False\n"
    wait_until(lambda: servers.run(sys.executable, script).stdout == "True False\n")
    servers.command("--stop")
    wait_until(lambda: not servers.pids())
    assert servers.run(sys.executable, script).stdout == "True False\n"  # another server knows from a file


def test_an_environment_beside_the_program_is_none_of_its_own_modules(servers: ForkServers, tmp_path: Path) -> None:
    venv.create(tmp_path / ".venv", symlinks=True)
    python = tmp_path / ".venv/bin/python"
    (site,) = (tmp_path / ".venv/lib").glob("python*/site-packages")
    (site / "library.py").write_text("")
    (tmp_path / "own.py").write_text("")
    script = tmp_path / "program.py"
    script.write_text("import sys; print('library' in sys.modules, 'own' in sys.modules); import library, own")
    assert servers.run(python, script).stdout == "False False\n"
    wait_until(lambda: servers.run(python, script).stdout == "True False\n")


def test_a_program_whose_imports_do_not_fit_is_forked_without_them(servers: ForkServers, tmp_path: Path) -> None:
    directory = tmp_path / "site"
    directory.mkdir()
    (directory / "noisy.py").write_text("print('noisy')")
    (directory / "quiet.py").write_text("")
    script = tmp_path / "app" / "program.py"
    script.parent.mkdir()
    script.write_text("import sys; print('quiet' in sys.modules); import noisy, quiet")
    more = {"PYTHONPATH": f"{directory}:{os.environ.get('PYTHONPATH', '')}"}
    assert servers.run(sys.executable, script, environment=more).stdout == "False\nnoisy\n"
    wait_until(lambda: servers.run(sys.executable, script, environment=more).stdout == "True\nnoisy\n")
    assert servers.run(sys.executable, script, environment=more).stderr == ""


def test_what_imports_a_module_that_is_left_out_is_left_out_with_it(servers: ForkServers, tmp_path: Path) -> None:
    package = tmp_path / "site" / "package"
    package.mkdir(parents=True)
    (package.parent / "draws.py").write_text("import random; random.random()")
    (package.parent / "fit.py").write_text("")
    for number in range(30):
        (package / f"part{number}.py").write_text("import draws")
    (package / "__init__.py").write_text("from package import " + ", ".join(f"part{number}" for number in range(30)))
    (package.parent / "uses.py").write_text("import package")
    script = tmp_path / "app" / "program.py"
    script.parent.mkdir()
    script.write_text("import sys; print('fit' in sys.modules, 'package' in sys.modules); import draws, uses, fit")
    more = {"PYTHONPATH": f"{package.parent}:{REPOSITORY}"}
    assert servers.run(sys.executable, script, environment=more).stdout == "False False\n"
    wait_until(lambda: servers.run(sys.executable, script, environment=more).stdout == "True False\n")
    (line,) = (line for line in servers.command("--list").stdout.splitlines() if " is left out: " in line)
    assert line.endswith("; with it modules of package, uses, which import it")
    assert f"draws is left out: {UNFIT['import random; random.random()']}" in line


def test_modules_of_a_package_are_left_out_one_by_one_however_many_they_are(
    servers: ForkServers, tmp_path: Path
) -> None:
    package = tmp_path / "site" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for number in range(20):
        (package / f"part{number}.py").write_text("import random; random.random()")
    names = ", ".join(f"package.part{number}" for number in range(20))
    script = tmp_path / "app" / "program.py"
    script.parent.mkdir()
    script.write_text(f"import sys; print(sorted(n for n in sys.modules if 'package' in n)); import {names}")
    more = {"PYTHONPATH": f"{package.parent}:{REPOSITORY}"}
    assert servers.run(sys.executable, script, environment=more).stdout == "[]\n"
    wait_until(lambda: servers.run(sys.executable, script, environment=more).stdout == "['package']\n")


def test_a_module_that_is_left_out_need_not_be_written_down(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "unfit.py").write_text("print('unfit')")
    script = tmp_path / "program.py"
    script.write_text("import sys; print('unfit' in sys.modules)")
    done = servers.run(
        sys.executable, script, options=("--preload=unfit",), environment={"XDG_CACHE_HOME": "/dev/null"}
    )
    assert done.stdout == "False\n"
    assert done.stderr == "trimsfs: unfit is not preloaded: it prints when it is imported\n"


def test_rich_is_there_and_numbers_its_links_anew_in_each_fork(servers: ForkServers, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import sys; print('rich.style' in sys.modules); import rich.style; print(next(rich.style._id_generator))"
    )
    done = [servers.run(sys.executable, script, options=("--preload=rich.console",)) for _ in range(2)]
    assert [each.stderr for each in done] == ["", ""]
    assert [each.stdout.partition("\n")[0] for each in done] == ["True", "True"]
    assert done[0].stdout != done[1].stdout


PAUSES = """
import numpy as np
def retry(func=None, initial_delay=0, wait=np.logspace(-1, 1, 5) * np.random.rand(5), exceptions=Exception): return wait
"""


@pytest.mark.parametrize("more", ["", "np.random.rand()"])
def test_pauses_that_jax_draws_are_drawn_in_each_fork_and_what_draws_more_is_left_out(
    servers: ForkServers, tmp_path: Path, more: str
) -> None:
    clusters = tmp_path / "jax" / "_src" / "clusters"
    clusters.mkdir(parents=True)
    (clusters / "k8s_cluster.py").write_text(PAUSES + more)
    for package in (clusters, clusters.parent, clusters.parent.parent):
        (package / "__init__.py").write_text("")
    script = tmp_path / "program.py"
    script.write_text(
        "import sys; print('jax._src.clusters.k8s_cluster' in sys.modules)\n"
        "from jax._src.clusters.k8s_cluster import retry; print(*retry())"
    )
    options = ("--preload=jax._src.clusters.k8s_cluster",)
    done = [servers.run(sys.executable, script, options=options) for _ in range(2)]
    assert [each.stdout.partition("\n")[0] for each in done] == [str(not more)] * 2
    assert [each.stderr == "" for each in done] == [not more] * 2
    pauses = [each.stdout.split()[1:] for each in done]
    assert pauses[0] != pauses[1]
    for each in pauses:
        assert all(0 <= float(pause) <= 10 for pause in each)
        assert len(each) == 5


def test_a_changed_file_is_imported_anew(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("VERSION = 1")
    script = tmp_path / "program.py"
    script.write_text("import sys; print('model' in sys.modules); import model; print(model.VERSION)")
    options = ("--preload", "model")
    assert servers.run(sys.executable, script, options=options).stdout == "True\n1\n"
    (tmp_path / "model.py").write_text("VERSION = 22")
    assert servers.run(sys.executable, script, options=options).stdout == "True\n22\n"


def test_two_programs_draw_different_random_numbers(servers: ForkServers, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text("import random, numpy; print(random.random()); print(numpy.random.rand(), numpy.random.bytes(4))")
    options = ("--preload", "random,numpy")
    done = [servers.run(sys.executable, script, options=options) for _ in range(3)]
    lines = [line for each in done for line in each.stdout.splitlines()]
    assert len(set(lines)) == len(lines) == 6


def test_variables_that_vary_share_a_server(servers: ForkServers) -> None:
    line = (sys.executable, "-c", "import os; print(os.environ['REQUEST_ID'], os.environ['SSH_TTY'])")
    for number in range(3):
        variables = {"REQUEST_ID": f"r{number}", "SSH_TTY": f"t{number}"}
        done = servers.run(*line, options=("--vary", "REQUEST_*"), environment=variables)
        assert done.stdout == f"r{number} t{number}\n"
    assert len(servers.pids()) == 1
    servers.run(*line, environment={"REQUEST_ID": "", "SSH_TTY": ""})
    servers.run(*line, environment={"REQUEST_ID": "x", "SSH_TTY": ""})
    assert len(servers.pids()) == 3


def test_what_an_import_does_to_the_environment_is_there(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "sets.py").write_text("import os; os.environ['SET'] = 'by import'; os.environ.pop('DROPPED', 0)")
    script = tmp_path / "program.py"
    script.write_text("import os; print(os.environ['SET'], 'DROPPED' in os.environ, os.environ['OWN'])")
    done = servers.run(
        sys.executable, script, options=("--preload=sets", "--vary=OWN"), environment={"DROPPED": "x", "OWN": "y"}
    )
    assert done.stdout == "by import False y\n"


def test_a_model_is_mapped_before_the_fork_and_a_new_version_makes_a_new_server(
    servers: ForkServers, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(bytes(1 << 20))
    script = tmp_path / "program.py"
    script.write_text("print(sum('model/weights' in line for line in open('/proc/self/maps')))")
    options = ("--model", str(model))
    assert servers.run(sys.executable, script, options=options).stdout == "1\n"
    before = servers.pids()
    time.sleep(0.01)
    (model / "weights").write_bytes(bytes(2 << 20))
    assert servers.run(sys.executable, script, options=options).stdout == "1\n"
    assert len(servers.pids()) == len(before) + 1


def test_a_model_that_is_not_there_is_said(servers: ForkServers, tmp_path: Path) -> None:
    done = servers.run(sys.executable, "-c", "print(1)", options=("--model", str(tmp_path / "none")))
    assert done.stdout == "1\n"
    assert done.stderr == f"trimsfs: not forked: {tmp_path}/none: No such file or directory\n"
