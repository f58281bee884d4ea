"""The keeper's loop: it waits for descriptors, signals and the next tick."""

import selectors
import signal
import socket
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def handled_in_loop(_number: int, _frame: object) -> None:
    """Handle a signal: the loop gets its number, too."""


class Loop:
    """Calls what is registered with its `selector` for a descriptor that can be read."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()

    def run(
        self,
        tick: Callable[[], float | None],
        on_signals: Callable[[bytes], None],
        on_stop: Callable[[int, object], None],
    ) -> None:
        """Run until *tick* returns None, rather than the seconds until it is due again.

        *on_signals* gets the numbers of signals in the loop; *on_stop* is called for one to stop at any time.
        """
        wakeup, waker = socket.socketpair()
        wakeup.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        signal.signal(signal.SIGCHLD, handled_in_loop)
        for number in STOP_SIGNALS:
            signal.signal(number, on_stop)
        self.selector.register(wakeup, selectors.EVENT_READ, lambda: on_signals(wakeup.recv(64)))
        try:
            while (due_s := tick()) is not None:
                for key, _ in self.selector.select(due_s):
                    act: Callable[[], None] = key.data
                    act()
        finally:
            signal.set_wakeup_fd(-1)
