"""What the tests of control files have in common."""

import json
import os
from typing import Any

import trio

from tests.support.parts import until
from tests.support.served import CONTROL_GID, OWNER, Server
from trimsfs.control.authorisation import Caller

COMMANDS = ("evict", "pin", "refresh", "unpin", "verify", "warm-disk", "warm-host")
ATTRIBUTES = ("digest", "etag", "generation", "pinned", "replaced", "residency", "verified")
ROOT = Caller(uid=0, groups=frozenset({0}))
IN_CONTROL_GROUP = Caller(uid=2000, groups=frozenset({2000, CONTROL_GID}))


async def on_disk(server: Server, path: str) -> int:
    """Bytes of a file on disk, as its attribute tells."""
    residency: dict[str, Any] = json.loads(await server.attribute(path, "residency") or "{}")
    return int(residency["disk"])


async def in_memory(server: Server, *paths: str) -> None:
    """Wait until files that are on disk have been brought into memory, which nobody waits for."""
    size = sum([await on_disk(server, path) for path in paths])
    await until(lambda: server.host.statistics().used_bytes == size and server.users() == 0)


def drop(descriptor: int) -> None:
    """Have the kernel drop a file's pages."""
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


async def last_line(server: Server, handle: int) -> dict[str, Any]:
    """Read what a command tells until its end: the last of it."""
    text = b""
    while piece := await server.read(handle, len(text), 4096):
        text += piece
    last: dict[str, Any] = json.loads(text.splitlines()[-1])
    return last


async def begin(server: Server, path: str, command: str = "warm-disk") -> dict[str, Any]:
    """Begin a job: what is told of it at once."""
    (job,) = await server.command(f"background-{command}", path)
    return job


async def jobs(server: Server, directory: str = "", caller: Caller = OWNER) -> list[dict[str, Any]]:
    """The jobs below a directory."""
    listed: list[dict[str, Any]] = json.loads(await server.content(f"{directory}/.trims/.trims/jobs", caller))["jobs"]
    return listed


async def ended(server: Server, number: str) -> dict[str, Any]:
    """Wait until a job has ended: what it has come to."""
    for _ in range(500):
        (job,) = [job for job in await jobs(server) if job["id"] == number]
        if job["ended"] is not None:
            return job
        await trio.sleep(0.01)
    raise AssertionError(job)
