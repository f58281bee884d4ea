"""Becomes a fork server at a socket that its operator names, for callers of other users and in containers."""

import json
import os
import signal
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress

from trimsfs.extras.spawn.caller import inherited_descriptors
from trimsfs.extras.spawn.messages import raised
from trimsfs.extras.spawn.models import files_of
from trimsfs.extras.spawn.python_command import PlainError, parse
from trimsfs.extras.spawn.servers import PADDING, PROGRAM, connect, new_socket, short_path


def become_server(
    path: str,
    words: Sequence[str],
    *,
    preload: Sequence[str],
    models: Sequence[str],
    vary: Sequence[str],
    allow: Sequence[str],
) -> None:
    """Become a fork server at a socket, by the interpreter and options that *words* name. Raises PlainError, OSError.

    Who may connect may have programs forked, which get all privileges of that caller and no others.
    """
    command = parse([*words, "-c", "pass"], os.environ)
    if not os.path.isabs(command.path):
        raise PlainError(f"{command.path}: name the interpreter by its absolute path, as callers must")
    line = [command.path, *command.options]
    path = os.path.abspath(path)
    files_of(models)
    settings = {
        "title": path,
        "preload": list(preload),
        "directory": "",
        "models": [os.path.abspath(model) for model in models],
        "idle_s": None,
        "learned": "",  # who may ask may be able to write wherever the socket lies
        "joining": {"line": line, "vary": list(vary), "allow": list(allow)},
    }
    if (running := connect(path)) is not None:
        running.close()
        raise PlainError(f"a fork server listens at {path} already")
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise PlainError(f"{path} is no socket")
        os.unlink(path)
    inherited = inherited_descriptors()
    for number in inherited:
        if number > 2:
            os.set_inheritable(number, False)  # a caller's descriptor of this number must find it free
    listener = new_socket()
    with short_path(path) as address:
        listener.bind(address)
    listener.listen(socket.SOMAXCONN)
    listener.set_inheritable(True)
    null = raised(os.open(os.devnull, os.O_RDWR), 3)
    for number in {0, 1, 2} - set(inherited) | {0}:
        os.dup2(null, number)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)  # else every program would inherit what this process ignores
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    arguments = [str(listener.fileno()), "-1", "0", json.dumps(settings), PADDING]
    os.execve(line[0], [*line, PROGRAM, *arguments], os.environ)
