"""Fork servers at a socket, for callers that may be in containers."""

import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trimsfs
from tests.support.fork_servers import TIMEOUT_S, TRIMSFS, own_environment
from tests.support.mounts import let_in, wait_until
from tests.support.users import STRANGER
from trimsfs.extras.spawn.servers import ask

PYTHON = "/usr/bin/python3"
"""One that every user may execute, for servers, callers and programs."""
SELF = r"""
import os, resource, socket, sqlite3
for name in ("user", "mnt", "pid", "net", "ipc", "uts", "time", "cgroup"):
    print(name, os.readlink(f"/proc/self/ns/{name}"))
fields = dict(line.rstrip("\n").split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
for name in ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Umask",
             "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NSpid"):
    print(name, fields[name] if name != "NSpid" else len(fields[name].split()))
limits = sorted(name for name in dir(resource) if name.startswith("RLIMIT_"))
print([resource.getrlimit(getattr(resource, name)) for name in limits], fields["SigIgn"], fields["SigBlk"])
print(open("/proc/self/cgroup").read(), open("/proc/self/oom_score_adj").read(), os.getpriority(os.PRIO_PROCESS, 0))
print(socket.gethostname(), os.getcwd(), os.stat("/").st_ino, os.path.exists("/mnt/only-here"))
"""
"""Prints what a program is."""
USER = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--inh-caps=-all"]


class ServerAtSocket:
    """A fork server at a socket that everybody may use, and a copy of trimsfs for callers, as in a container."""

    def __init__(self, directory: Path, preload: str, options: Sequence[str], start: Sequence[str]) -> None:
        self.directory = directory
        self.path = directory / "fork-server.socket"
        package = Path(trimsfs.__file__).parent
        shutil.copytree(package, directory / "site/trimsfs", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        command = [str(TRIMSFS), "spawn", f"--preload={preload}", *options, "--serve", str(self.path), "--", PYTHON]
        if start[: len(USER)] == USER:  # who cannot enter the environment of the tests
            arguments = f"{str(self.path)!r}, [{PYTHON!r}], preload=['json'], models=[], vary=[], allow=[]"
            command = self.python(f"from trimsfs.extras.spawn.shared_server import *; become_server({arguments})")
        self.process = subprocess.Popen(
            [*start, *command], umask=0, stderr=subprocess.PIPE, text=True, env=own_environment()
        )
        wait_until(lambda: ask(str(self.path), "tell") is not None)

    def python(self, text: str) -> list[str]:
        """A program of the system's Python that finds the copy of trimsfs."""
        place = str(self.directory / "site")
        return [PYTHON, "-c", f"import sys; sys.path.insert(0, {place!r}); sys.argv[0] = 'trimsfs'; {text}"]

    def line(self, *words: str) -> list[str]:
        """`trimsfs spawn`."""
        return [*self.python("from trimsfs.__main__ import main; main()"), "spawn", *words]

    def both(self, text: str, *start: str, before: str = ":") -> tuple[str, str, str]:
        """What a program prints as it is, and in a fork, and on standard error; started by one shell."""
        script = self.directory / "program.py"
        script.write_text(text)
        program = [PYTHON, str(script)]
        forked = self.line("--socket", str(self.path), "--", *program)
        shell = f"set -e; {before}; {shlex.join(program)}; echo ====; {shlex.join(forked)}"
        done = subprocess.run(
            [*start, "sh", "-c", shell],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
            umask=0o027,
            env=own_environment(),
        )
        one, two = done.stdout.split("====\n")
        return one, two, done.stderr


@contextmanager
def serving(
    directory: Path, *options: str, preload: str = "sqlite3,json", start: Sequence[str] = ()
) -> Iterator[ServerAtSocket]:
    """A server with options, which *start* starts."""
    place = directory / f"server{len(list(directory.iterdir()))}"
    place.mkdir()
    let_in(place)
    place.chmod(0o777)
    server = ServerAtSocket(place, preload, options, start)
    try:
        yield server
    finally:
        server.process.terminate()
        _, errors = server.process.communicate(timeout=TIMEOUT_S)
        assert "Traceback" not in errors
