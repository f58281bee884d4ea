"""A real spawner for tests: ``python -m tests.support.spawner FD DIRECTORY WRITE_SIZE STREAMING``.

The program forks it while it has no threads, as a server does, passes the server's end of it on through FD and ends.
"""

import errno
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from trimsfs import errors
from trimsfs.fetch.processes import thread_copier
from trimsfs.fetch.processes.thread_copier import ThreadCopier
from trimsfs.fetch.processes.workers import fork_spawner
from trimsfs.stores.base import Sink
from trimsfs.stores.local_directory import DirectoryStore
from trimsfs.types import Generation

HANG_S = 600


class OddStore(DirectoryStore):
    """A directory; some keys do not name a file in it but what should happen.

    ``error/KIND/TEXT`` raises, ``hang/BYTES`` gives so many bytes and then nothing for long, ``self`` tells the process
    and its parent in place of a version, ``helper/STATUS`` how a program ended that this process ran.
    """

    def __init__(self, root: Path, *, streaming: bool) -> None:
        super().__init__(root)
        self.streaming = streaming

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:  # type: ignore[override]
        what, _, rest = generation.key.partition("/")
        if what == "self":
            return f"{os.getpid()} {os.getppid()}"
        if what == "helper":
            return await self._call(partial(_helper, rest))
        if what == "error":
            kind, _, text = rest.partition("/")
            if kind == "defect":
                raise ZeroDivisionError(text)
            raise getattr(errors, kind)(text)
        if what == "hang":
            return await self._call(partial(_hang, int(rest), sink))
        await super().read(generation, offset, length, sink)
        return None


def _helper(status: str) -> str:
    return str(subprocess.run(["sh", "-c", f"exit {status}"], check=False).returncode)


def _hang(count: int, sink: Sink) -> None:
    sink(bytes(count))
    time.sleep(HANG_S)
    raise OSError(errno.EIO, "the test is over by now")


def make_copier(root: Path, *, streaming: bool) -> ThreadCopier:
    return ThreadCopier(OddStore(root, streaming=streaming), threads=8)


def main() -> None:
    end, root, write_size, streaming = sys.argv[1:]
    vars(thread_copier)["WRITE_SIZE"] = int(write_size)
    with socket.socket(fileno=int(end)) as test:
        test.set_inheritable(False)
        make = partial(make_copier, Path(root), streaming=streaming == "True")
        process = fork_spawner(make, mountpoint=Path("/models"))
        socket.send_fds(test, [str(process.pid).encode()], [process.socket.fileno()])


if __name__ == "__main__":
    main()
