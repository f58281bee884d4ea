"""A program that has a file of a mount open in a way of its own: ``python sharer.py KIND PATH``.

It says ``ready``, waits for a line, and tells the SHA-256 of what it reads then, and of what its mapping shows.
"""

import hashlib
import mmap
import os
import socket
import sys
from collections.abc import Callable


def show(descriptor: int, mapping: mmap.mmap | None = None) -> None:
    """Wait for the word, and tell what is seen."""
    print("ready", flush=True)
    sys.stdin.readline()
    told = hashlib.sha256()
    offset = 0
    while piece := os.pread(descriptor, 1 << 20, offset):
        told.update(piece)
        offset += len(piece)
    print(told.hexdigest(), flush=True)
    if mapping is None:
        mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    print(hashlib.sha256(mapping).hexdigest(), flush=True)


def forked(descriptor: int) -> None:
    """The child goes on with what its parent has opened and mapped, who is gone."""
    mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    parent = os.getpid()
    if os.fork():
        mapping.close()
        os.close(descriptor)
        os._exit(0)
    while os.getppid() == parent:
        os.sched_yield()
    show(descriptor, mapping)


def duplicated(descriptor: int) -> None:
    """One of two descriptors is closed."""
    other = os.dup(descriptor)
    os.close(descriptor)
    show(other)


def inherited(descriptor: int) -> None:
    """Another program goes on."""
    os.set_inheritable(descriptor, True)
    os.execv(sys.executable, [sys.executable, __file__, "given", str(descriptor)])


def sent(descriptor: int) -> None:
    """Nobody has it open but a socket, in which it is on its way."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    socket.send_fds(one, [b"x"], [descriptor])
    os.close(descriptor)
    one.close()
    print("ready", flush=True)
    sys.stdin.readline()
    _, descriptors, _, _ = socket.recv_fds(other, 1, 1)
    show(descriptors[0])


KINDS: dict[str, Callable[[int], None]] = {kind.__name__: kind for kind in (forked, duplicated, inherited, sent)}

if __name__ == "__main__":
    kind, path = sys.argv[1:]
    if kind == "given":
        show(int(path))
    else:
        KINDS[kind](os.open(path, os.O_RDONLY))
