"""The phases of a keeper: whether another server follows one that ends, and when the keeper itself ends."""

import enum


class Phase(enum.Enum):
    """The state of the mount. Phases follow each other in this order; a keeper may skip some.

    A keeper that takes over the mount of an earlier keeper begins with REPLACEABLE.
    """

    STARTING = enum.auto()
    """No server has been ready yet. If the first one ends, the keeper reports why, and ends."""
    IRREPLACEABLE = enum.auto()
    """A server is ready, but this kernel (before Linux 6.9) does not resend the requests that it leaves unanswered. So
    no other server can take over, and the keeper ends with this one."""
    REPLACEABLE = enum.auto()
    """Servers may end at any moment, and operators may replace them: the next one takes the mount over."""
    UNMOUNTED = enum.auto()
    """The file system is unmounted, or its connection was aborted. The server gets a moment to record its state.
    The keeper starts no other, and ends with this one."""
    OVERDUE = enum.auto()
    """The keeper has killed a server that did not end after the unmount. The keeper exits with 0 all the same: after a
    failure, a service manager would mount again."""
    ENDING = enum.auto()
    """The keeper ends: it leaves its loop, ends its servers and unmounts."""

    @property
    def replaceable(self) -> bool:
        return self is Phase.REPLACEABLE

    @property
    def refusal(self) -> str | None:
        """Why the keeper refuses to replace the server; None if it does not."""
        if self.unmounted:
            return "it is unmounted, and its server ends"
        if not self.replaceable:
            return "before Linux 6.9 no server can take over a mount: run `mountctl down` and `mountctl up`"
        return None

    @property
    def unmounted(self) -> bool:
        return self in {Phase.UNMOUNTED, Phase.OVERDUE}
