"""A program in a fork prints what it prints without, and ends with the same status."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fork_servers import ForkServers

PROGRAMS = {
    "arguments": "import sys; print(sys.argv, sys.orig_argv[1:], sys.path[0])",
    "main module": """
import sys, pickle, __main__
class Here: pass
print(__name__, __file__, __spec__, __doc__, __package__, __builtins__, sorted(globals()), sys.modules['__main__'])
print(pickle.loads(pickle.dumps(Here())).__class__ is Here is __main__.Here)
""",
    "status": "import sys; sys.exit(7)",
    "message as status": "import sys; sys.exit('no such model')",
    "exception": "def f(): return g()\ndef g(): raise ValueError('x')\nf()",
    "chained exceptions": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('x') from error",
    "exception hook": "import sys; sys.excepthook = lambda *a: print('hook', a[1]); raise ValueError('x')",
    "syntax error": "def f(:\n",
    "name of a file that is not there": "open('/no/such/file')",
    "interrupt": "raise KeyboardInterrupt",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)",
    "abort": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); import os; os.abort()",
    "exit at once": "import os; os.write(1, b'x'); os._exit(5)",
    "at exit": "import atexit; atexit.register(print, 'end'); print('begin')",
    "threads are awaited": """
import threading, time
threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start(); print('main')
""",
    "descriptors": "import os; print(sorted(n for n in range(50) if os.path.exists(f'/proc/self/fd/{n}')))",
    "streams": """
import sys
for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream.name, stream.mode, stream.encoding, stream.errors, stream.line_buffering, stream.write_through,
          stream.isatty(), stream.seekable(), type(stream.buffer).__name__,
          stream is getattr(sys, '__%s__' % stream.name[1:-1]))
print(sys.stdin.read())
""",
    "order of streams": "import sys; print('out'); print('err', file=sys.stderr); print('out')",
    "directory": "import os; print(os.getcwd()); print(sorted(os.listdir()))",
    "environment": "import os; print(sorted((n, v) for n, v in os.environ.items() if n != '_'))",
    "child gets the environment": "import subprocess; print(subprocess.run(['env'], capture_output=True).stdout)",
    "workers": """
import multiprocessing
def double(x): return 2 * x
if __name__ == '__main__':
    for method in ('fork', 'spawn', 'forkserver'):
        with multiprocessing.get_context(method).Pool(2) as pool: print(pool.map(double, range(5)))
""",
    "executor": """
from concurrent.futures import ProcessPoolExecutor
def double(x): return 2 * x
if __name__ == '__main__':
    with ProcessPoolExecutor(2) as pool: print(list(pool.map(double, range(5))))
""",
    "asyncio": """
import asyncio
async def main():
    process = await asyncio.create_subprocess_exec('echo', 'x', stdout=asyncio.subprocess.PIPE)
    print((await process.communicate())[0], process.returncode)
asyncio.run(main())
""",
    "signals": """
import signal, sys
for number in sorted(signal.valid_signals()):
    handler = signal.getsignal(number)
    if handler is not signal.SIG_DFL: print(number, handler)
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.set_wakeup_fd(-1))
""",
    "limits": "import resource; print([resource.getrlimit(n) for n in range(16)])",
    "umask": "import os; print(oct(os.umask(0)))",
    "affinity": "import os; print(os.sched_getaffinity(0), os.nice(0))",
    "warnings": "import warnings; warnings.warn('old', DeprecationWarning); warnings.warn('new')",
    "own module": "import own_module; print(own_module.__file__, own_module.WORD)",
    "modules": "import sys; print(any(n.startswith('trimsfs') for n in sys.modules))",
    "name": "print(open('/proc/self/cmdline').read().rstrip('\\0').split('\\0')[1:], open('/proc/self/comm').read())",
    "standard output that nobody reads": "import sys, os; os.close(1); os.pipe(); print('x' * 100)",
    "closed descriptors": "import os; os.closerange(3, 1 << 16); import tabnanny; print(1)",
    "closed output": "import sys; sys.stdout.close()",
    "logging": "import logging; logging.basicConfig(level=10); logging.getLogger('x').info('said %s', 1)",
    "tracing": "import sys; print(sys.gettrace(), sys.getprofile(), sys.flags)",
    "temporary files": "import tempfile, os; f = tempfile.mkstemp(); print(os.path.dirname(f[1])); os.unlink(f[1])",
}


def _outcome(done: "subprocess.CompletedProcess[str]") -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


def _written(tmp_path: Path, text: str) -> Path:
    script = tmp_path / "program.py"
    script.write_text(text)
    (tmp_path / "own_module.py").write_text("WORD = 'own'")
    return script


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_the_same(servers: ForkServers, tmp_path: Path, name: str) -> None:
    script = _written(tmp_path, PROGRAMS[name])
    (tmp_path / "input").write_text("some input")
    arguments = ["-x", "--", "ü"]
    outcomes = []
    for line in ([sys.executable, str(script), *arguments], servers.line(sys.executable, script, *arguments)):
        for _ in range(2):  # the second fork has what the first imported
            with (tmp_path / "input").open() as stdin:
                stdin.seek(5)
                done = subprocess.run(
                    line,
                    stdin=stdin,
                    capture_output=True,
                    text=True,
                    timeout=60,
                    cwd=tmp_path,
                    env=servers.environment,
                    check=False,
                )
            outcomes.append(_outcome(done))
    assert outcomes[2:] == outcomes[:2]
    assert servers.pids(), servers.logs()


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import sys; print(sys.argv, sys.path[0], __name__); raise ValueError", "x"],
        ["-m", "own_module", "-x"],
        ["-m", "no_such_module"],
        ["-Wignore", "-u", "-OO", "program.py"],
        ["-W", "error", "-X", "utf8", "program.py"],
        ["-I", "program.py"],
        ["-Es", "-B", "program.py"],
        ["-P", "program.py", "-c"],
        ["./program.py", "x"],
        ["link.py"],
        ["no_such_file.py"],
        ["--version"],
        ["-c"],
        ["-"],
    ],
)
def test_a_command_line_means_the_same(servers: ForkServers, tmp_path: Path, words: list[str]) -> None:
    text = "import sys, warnings; warnings.warn('x'); print(sys.argv, sys.path[0], sys.flags, __file__, __debug__)"
    script = _written(tmp_path, text)
    (tmp_path / "own_module.py").write_text(text)
    (tmp_path / "link.py").symlink_to(script)
    wanted = subprocess.run(
        [sys.executable, *words],
        env=servers.environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        input="1+1",
    )
    forked = servers.run(sys.executable, *words, cwd=tmp_path, input="1+1")
    why = [line for line in forked.stderr.splitlines(keepends=True) if line.startswith("trimsfs: not forked: ")]
    assert (forked.returncode, forked.stdout) == (wanted.returncode, wanted.stdout)
    assert forked.stderr == "".join(why) + wanted.stderr
    assert len(why) == (words[-1] in {"no_such_file.py", "--version", "-c", "-"} and "program.py" not in words)


def test_a_script_that_names_its_interpreter_is_forked(servers: ForkServers, tmp_path: Path) -> None:
    script = tmp_path / "tool"
    script.write_text(f"#!{sys.executable} -u\nimport sys; print(sys.argv, __file__, sys.orig_argv)")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    wanted = subprocess.run([script, "x"], env=servers.environment, capture_output=True, text=True, check=False)
    assert _outcome(servers.run(script, "x")) == _outcome(wanted)
    assert len(servers.pids()) == 1


@pytest.mark.parametrize("words", [["true"], ["sh", "-c", "exit 3"], ["no-such-command"], ["/etc/passwd"]])
def test_other_programs_run_as_they_are(servers: ForkServers, words: list[str]) -> None:
    done = servers.run(*words)
    assert done.returncode == {"true": 0, "sh": 3, "no-such-command": 127, "/etc/passwd": 126}[words[0]]
    assert done.stderr.startswith("trimsfs: not forked: ")
    assert not servers.pids()


def test_descriptors_limits_and_signals_are_the_callers(servers: ForkServers, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import os, resource, signal\n"
        "print(os.read(7, 10), os.readlink('/proc/self/fd/7'), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "print(oct(os.umask(0)), signal.getsignal(signal.SIGHUP), signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
        "print(sorted(n for n in range(100) if os.path.exists(f'/proc/self/fd/{n}')), os.getcwd())\n"
    )
    (tmp_path / "data").write_text("content of it")
    shell = 'exec 7<data 9>out; read -n 8 x <&7; ulimit -Sn 150; umask 027; trap "" HUP; cd sub; exec "$@"'
    (tmp_path / "sub").mkdir()
    outcomes = []
    for line in ([sys.executable, str(script)], servers.line(sys.executable, script)):
        done = subprocess.run(
            ["bash", "-c", shell, "bash", *line],
            env=servers.environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2}),
        )
        outcomes.append(_outcome(done))
    assert outcomes[1] == outcomes[0]
    assert outcomes[0][0] == 0


def test_many_descriptors_go_along(servers: ForkServers) -> None:
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(600)]
    try:
        count = "import os; print(sum(int(n) < 4096 for n in os.listdir('/proc/self/fd')))"
        line = [sys.executable, "-c", count]
        wanted = subprocess.run(line, pass_fds=files, capture_output=True, text=True, check=True)
        done = servers.run(*line, pass_fds=files)
        assert (done.stdout, done.stderr) == (wanted.stdout, "")
    finally:
        for file in files:
            os.close(file)
