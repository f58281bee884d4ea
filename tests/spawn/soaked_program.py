"""What the children of the soak of fork servers do: ``soaked_program.py ACT [WORD...]``."""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable

NOTHING_SHORTER_S = 100
"""So long does a program run that somebody else is to end."""


def _daemon(path: str) -> None:
    if os.fork() == 0:
        os.setsid()
        time.sleep(0.3)
        with open(path, "w") as file:
            file.write("lived on")


def _die(number: int) -> None:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _stop() -> None:
    print(os.getpid(), flush=True)
    print("went on after", sys.stdin.readline())


def _wait() -> None:
    for number in (signal.SIGPIPE, signal.SIGHUP):  # Python ignores the one, and `nohup` the other
        signal.signal(number, signal.SIG_DFL)
    print(os.getpid(), flush=True)
    time.sleep(NOTHING_SHORTER_S)


def _streams(path: str) -> None:
    print("nobody reads this", flush=True)
    with open(path, "w") as file:
        print(sys.stdin is None, sys.stdout is None, sys.stderr is None, file=file)


def _files() -> None:
    opened: list[int] = []
    try:
        while len(opened) < 100:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        print(error)
    print(opened, resource.getrlimit(resource.RLIMIT_NOFILE))


def _module() -> None:
    import soaked_module  # type: ignore[import-not-found]

    print(soaked_module.VERSION)


def _raise() -> None:
    raise ValueError("as it should")


def _fork() -> None:
    """Parent and child both end as programs do, at the same time."""
    import tabnanny  # noqa: F401 - both have something to tell a server that learns

    sys.stdout.write(f"{os.fork() > 0}\n")


ACTS: dict[str, Callable[..., object]] = {
    "exit": lambda number: sys.exit(int(number)),
    "_exit": lambda number: (print("written", flush=True), os._exit(int(number))),
    "echo": lambda *words: print(words, sys.stdin.read()),
    "text": lambda: sys.exit("a last word"),
    "raise": _raise,
    "die": lambda number: _die(int(number)),
    "segv": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "wait": _wait,
    "stop": _stop,
    "much": lambda: print("x" * 200_000),
    "streams": _streams,
    "daemon": _daemon,
    "fork": _fork,
    "close": lambda: os.closerange(3, 10_000),
    "files": _files,
    "module": _module,
}
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ACTS[sys.argv[1]](*sys.argv[2:])
