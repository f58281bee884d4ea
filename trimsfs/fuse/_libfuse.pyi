"""The extension of libfuse; ``_libfuse.c`` tells how it changes pyfuse3's calls."""

from collections.abc import Callable
from typing import Final, TypedDict

IOC_RESIDENCY: Final[int]
"""Number of the ioctl that returns a ``struct trimsfs_residency``."""
IOC_STATE: Final[int]
"""Number of the ioctl that returns whether a file is here as a whole, and whether control files tell which blocks files
share."""
IOC_DERIVED: Final[int]
"""Number of the ioctl that takes a ``struct trimsfs_piece``."""
IOC_CALLER: Final[int]
"""Number of the ioctl that returns the caller's user id."""
IOC_GPU: Final[int]
"""Number of the ioctl that leases a GPU copy by a ``struct trimsfs_gpu``."""
LIBFUSE: Final[str]
"""Version of the loaded libfuse."""
PASSTHROUGH_BUILT: Final[int]
"""1 if libfuse at build time had passthrough, else 0."""

_Entry = tuple[int, float, float, int, int, int, int, int, int]
"""What the kernel gets of a name: inode number, seconds to cache name and attributes, mode, owner, group, size, read
size, modification time (ns)."""

class _Connection(TypedDict):
    interposed: bool
    passthrough: bool
    direct: bool
    resends: bool
    minor: int

def configure(
    *,
    passthrough: bool,
    hide_threads: bool,
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
    """Set what to ask of the kernel, and the callbacks. Call it before the session is made.

    ``hide_threads`` makes all thread ids 0: they are of a PID namespace that this process does not see.
    ``stack_depth`` is 1 where backing files lie on overlayfs, else 0. All callbacks run in the thread that processes
    requests:

    - ``on_lookup`` gets a directory's number, a name and the caller's thread id. It returns the entry, or None to leave
      the answer to pyfuse3.
    - ``on_open`` gets the number of a passed-through file, and of the request. It returns a handle that it has recorded
      as offered, or None to leave the answer to pyfuse3.
    - ``on_used`` gets such a handle once the kernel has it, and the caller's thread, user and group id.
    - ``on_ioctl`` gets a request, an inode number, a file handle, the caller's user and thread id, a command and the
      caller's data. It sees to a reply, and returns whether it has replied already.
    - ``on_interrupt`` gets the id of a thread whose open or ioctl a signal should end.
    - ``on_asked_again`` gets the kernel's number of an open that it sends again.
    - ``on_offered`` gets a handle, and the number of the open that it is about to answer; 0 if that is not known.
    - ``on_opened`` gets a handle once the kernel has it.
    - ``on_release`` gets a handle that nobody has any more, or that the kernel did not take.
    - ``is_idle`` returns whether the event loop may be held up for some microseconds.
    """

def connection() -> _Connection:
    """The connection. ``interposed``: pyfuse3's calls go through this module. ``passthrough``: the kernel agreed to it.
    ``direct``: it maps files, too, of which it passes every read on.
    ``resends``: the kernel can send unanswered requests again to another process. ``minor``: the protocol version."""

def init_message() -> bytes:
    """The kernel's INIT message; empty before it arrives."""

def replay_init(message: bytes, /) -> None:
    """Make the session continue a connection that another process began with this INIT message.

    Raises ValueError when there is no session or the message is too short.
    """

def thread() -> int:
    """The id of the thread whose request was processed last; 0 for one in another PID namespace.

    A handler that calls this before its first ``await`` gets the thread of its own request.
    """

def reply_ioctl(request: int, data: bytes, /) -> int:
    """Answer an ioctl with data. Returns 0 or a negative errno."""

def reply_error(request: int, number: int, /) -> int:
    """Answer an ioctl with an errno. Returns 0 or a negative errno."""
