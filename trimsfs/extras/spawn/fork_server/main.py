"""Sets a fork server up: its descriptors, the models that it maps, what it imports."""

import json
import mmap
import os
import resource
import socket
import sys
from typing import Any

from trimsfs.extras.spawn.fork_server.child import set_title
from trimsfs.extras.spawn.fork_server.joining import Joining
from trimsfs.extras.spawn.fork_server.preloading import Preloading, UnfitError
from trimsfs.extras.spawn.fork_server.programs import Program
from trimsfs.extras.spawn.fork_server.server import Server
from trimsfs.extras.spawn.fork_server.successors import Successors
from trimsfs.extras.spawn.fork_server.thread_count import ThreadCount
from trimsfs.extras.spawn.messages import raised
from trimsfs.extras.spawn.models import files_of

FIRST_DESCRIPTOR = 4096
"""Below are the numbers of callers' descriptors; fewer where this process may not open so many."""
WITHOUT_THREADS = {"ORT_DISABLE_TELEMETRY": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Variables by which libraries start no thread at their import, unless callers set them. Programs do not get them."""
_MADV_POPULATE_READ = 22
_models: list[mmap.mmap] = []
"""Mapped as long as this process, or a fork of it, runs."""


def main(arguments: list[str]) -> Program | None:
    """Serve. Returns in a fork, with what it is to run; else at the server's end, with None."""
    listener_number, ready, generation = map(int, arguments[:3])
    settings = _settings(arguments[3])
    threads = ThreadCount()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # programs get their callers' limit
    first = min(FIRST_DESCRIPTOR, most // 2)
    listener = socket.socket(fileno=raised(listener_number, first))
    if ready >= 0:
        ready = raised(ready, first)
    else:
        listener.listen(socket.SOMAXCONN)  # who asks is told this process's pid by the kernel
    set_title(["trimsfs fork-server", settings["title"]])
    successors = Successors(settings, arguments, generation)
    joining = settings["joining"] and Joining(**settings["joining"], first=first)
    os.chdir("/")
    for name, value in WITHOUT_THREADS.items():
        os.environ.setdefault(name, value)
    models = files_of(settings["models"])
    _map_models([path for path, *_ in models])
    preloading = _preload(settings, successors, threads, [listener.fileno(), ready], first)
    preloading.models = {path: (inode, size, modified) for path, _, inode, size, modified in models}
    listener.listen(socket.SOMAXCONN)
    server = Server(
        listener,
        preloading,
        threads,
        first=first,
        idle_s=settings["idle_s"],
        successors=successors,
        joining=joining,
    )
    if ready >= 0:
        os.write(ready, b"1")
        os.close(ready)
    return server.serve()


def _settings(argument: str) -> dict[str, Any]:
    """What a server is to do: JSON text itself, or the path of a file that has it."""
    text = argument
    if not argument.startswith("{"):
        with open(argument) as file:
            text = file.read()
    settings: dict[str, Any] = json.loads(text)
    return settings


def _preload(
    settings: dict[str, Any], successors: Successors, threads: ThreadCount, inherited: list[int], first: int
) -> Preloading:
    preloading = Preloading(threads)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    kept = [null]
    while kept[-1] < first - 1:
        kept.append(os.dup(null))  # so that no library takes the number of a caller's descriptor
    path = list(sys.path)
    if settings["directory"] and not sys.flags.safe_path:
        sys.path.insert(0, settings["directory"])
    try:
        if successors.doubts:
            for unfit in preloading.sift(successors.modules, successors.left_out):
                successors.leave_out(unfit)
        preloading.load(successors.modules, successors.left_out)
    except UnfitError as unfit:
        successors.leave_out(unfit)
        successors.start_over(*inherited)
    for number in kept:
        os.close(number)
    sys.path[:] = path
    return preloading


def _map_models(paths: list[str]) -> None:
    """Map the files of models and have them in memory, so that each fork finds them there."""
    for path in paths:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                mapping.madvise(_MADV_POPULATE_READ)
                _models.append(mapping)
