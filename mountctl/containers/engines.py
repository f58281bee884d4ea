"""Asks container engines for a container's first process."""

import json
import re
import shutil
import subprocess

from trimsfs.errors import ConfigurationError, EngineError, NoSuchEntryError

TIMEOUT_S = 20.0
_INSPECT = ("inspect", "--type", "container", "--format", "{{json .State.Pid}}")
ENGINES: dict[str, tuple[str, ...]] = {
    "podman": _INSPECT,
    "docker": _INSPECT,
    "nerdctl": _INSPECT,
    "crictl": ("inspect", "--output", "go-template", "--template", "{{json .info.pid}}"),
}
"""The command with which each engine prints the pid of a container; the container's name follows."""


def process_of(container: str, engine: str | None = None) -> int:
    """The first process of a container; *container* is its name, or a process's number. Raises TrimsError."""
    if engine is None and container.isdecimal() and container.isascii():
        if not 0 < int(container[:12]) < 1 << 31:
            raise ConfigurationError(f"{container}: not the number of a process")
        return int(container)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", container):
        raise ConfigurationError(
            f"{container!r}: neither a container's name nor the number of a process: give one of them"
        )
    installed = [name for name in ENGINES if shutil.which(name) is not None and engine in {None, name}]
    if not installed:
        wanted = engine or f"none of {', '.join(ENGINES)}"
        raise EngineError(f"{container}: {wanted} is{' not' if engine else ''} installed: give the number of a process")
    processes: dict[str, int] = {}
    causes = []
    for name in installed:
        answer = _ask(name, container)
        if isinstance(answer, int):
            processes[name] = answer
        else:
            causes.append(f"{name}: {answer}")
    if len(set(processes.values())) > 1:
        raise ConfigurationError(
            f"{container}: {' and '.join(processes)} have a container of this name: choose with --engine"
        )
    if not processes:
        raise NoSuchEntryError(f"{container}: no such container ({'; '.join(causes)})")
    (process,) = set(processes.values())
    if process <= 0:
        raise NoSuchEntryError(f"{container}: the container does not run: start it first")
    return process


def _ask(engine: str, container: str) -> int | str:
    """The process of a container, 0 if it does not run; or the engine's error message."""
    command = [engine, *ENGINES[engine], "--", container]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"{engine}: no answer in {TIMEOUT_S:.0f} s: give the number of a process") from None
    except OSError as error:
        raise EngineError(f"{engine}: {error.strerror}: give the number of a process") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1][:200] if lines else f"exit code {done.returncode}"
    try:
        process = json.loads(done.stdout)
    except ValueError:
        process = None
    if not isinstance(process, int):
        raise EngineError(f"{engine}: {done.stdout.strip()[:80]!r} is not the number of a process")
    return process
