"""The extension over libfuse; what it does to pyfuse3's calls is told in ``_libfuse.c``."""

from collections.abc import Callable
from typing import Final, TypedDict

IOC_RESIDENCY: Final[int]
"""Number of the ioctl that gives a ``struct trimsfs_residency``."""
IOC_STATE: Final[int]
"""Number of the ioctl that tells whether all of a file is here, and has something in common with another."""
IOC_DERIVED: Final[int]
"""Number of the ioctl that takes a ``struct trimsfs_piece``."""
IOC_CALLER: Final[int]
"""Number of the ioctl that gives the caller's user id."""
IOC_GPU: Final[int]
"""Number of the ioctl that lends a ``struct trimsfs_gpu``."""
LIBFUSE: Final[str]
"""Version of the libfuse that is loaded."""
PASSTHROUGH_BUILT: Final[int]
"""1 where the libfuse of the build knows passthrough, else 0."""

_Entry = tuple[int, float, float, int, int, int, int, int, int]
"""What the kernel gets of a name: number, seconds that the name and the attributes hold, mode, owner, group, size,
preferred size of a read, and time in nanoseconds."""

class _Connection(TypedDict):
    interposed: bool
    passthrough: bool
    resends: bool
    minor: int

def configure(
    *,
    passthrough: bool,
    stack_depth: int,
    max_background: int,
    on_lookup: Callable[[int, bytes, int], _Entry | None],
    on_open: Callable[[int, int], int | None],
    on_used: Callable[[int, int, int, int], None],
    on_ioctl: Callable[[int, int, int, int, int, int, bytes], bool],
    on_interrupt: Callable[[int], None],
    on_asked_again: Callable[[int], None],
    on_offered: Callable[[int, int], None],
    on_opened: Callable[[int], None],
    on_release: Callable[[int], None],
    is_idle: Callable[[], bool],
) -> None:
    """Tell, before the session is made, what to ask of the kernel.

    ``stack_depth`` is 1 where backing files lie on overlayfs, else 0. ``on_lookup`` gets the number of a directory, a
    name and the caller's thread id, and gives what the name is; ``on_open`` gets the number of a file that the kernel
    reads by itself and of the request, and gives a handle that it has recorded as offered: both None where that takes
    longer, and pyfuse3 is to see to it. ``on_used`` gets such a handle once the kernel has it, and the caller's thread,
    user and group id. ``on_ioctl`` gets a request, an inode number, a file handle, the caller's user and thread id, a
    command and what the caller passed, and sees to a reply: whether it has replied; ``on_interrupt`` gets the id of a
    thread whose open or ioctl a signal should end; ``on_asked_again`` gets the kernel's number of an open that an
    earlier server has not answered, ``on_offered`` a handle and the number of the open that is about to be answered
    with it, or 0 where that is not known; ``on_opened`` gets a handle once the kernel has it, ``on_release`` one that
    nobody has any more, or that the kernel did not take; ``is_idle`` tells whether the event loop may be held up for
    some microseconds. All are called in the thread that processes requests.
    """

def connection() -> _Connection:
    """What came of it: whether pyfuse3 goes through this module, whether the kernel agreed to passthrough, and whether
    it can send requests again that another process has left unanswered."""

def init_message() -> bytes:
    """The kernel's INIT message; empty before it came."""

def replay_init(message: bytes, /) -> None:
    """Have the session take up a connection that another process began with this INIT message.

    Raises ValueError when there is no session or the message is too short.
    """

def thread() -> int:
    """The id of the thread that made the request processed last; 0 for one of another PID namespace.

    A handler that asks before its first ``await`` learns of its own request.
    """

def reply_ioctl(request: int, data: bytes, /) -> int:
    """Answer an ioctl with data. Returns 0 or a negative errno."""

def reply_error(request: int, number: int, /) -> int:
    """Answer an ioctl with an errno. Returns 0 or a negative errno."""
