"""Authorisation: who may command a mount, and who may learn of which file."""

from collections.abc import Callable
from dataclasses import dataclass

from trimsfs.namespace.derived import owner
from trimsfs.namespace.listing import CONTROL_NAME
from trimsfs.namespace.permissions import Permissions
from trimsfs.options import MountOptions

CONTROL_PART = f"{CONTROL_NAME.decode()}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who opened a control file, by the host's ids. ``pid`` is that of the thread; 0 in another PID namespace."""

    uid: int
    groups: frozenset[int]
    pid: int = 0


class Authorisation:
    """Decides by the mount's options. ``permissions`` has the owners and modes of its files."""

    def __init__(self, options: MountOptions) -> None:
        self.permissions = Permissions(options)
        self._owner = options.uid
        self._control_gid = options.control_gid

    def may_command(self, caller: Caller) -> bool:
        """Whether a caller may give commands: root, the mount's owner, and members of its control group may."""
        return caller.uid in {0, self._owner} or self._control_gid in caller.groups

    def may_read(self, key: str, caller: Caller) -> bool:
        """Whether a caller may read a file. Only its maker and root may read a derived blob."""
        made_by = owner(key.rpartition("/")[2]) if CONTROL_PART in key else None
        if made_by is not None and caller.uid not in {0, made_by}:
            return False
        return self.permissions.may_read(key, caller.uid, caller.groups)

    def may_list(self, path: str, caller: Caller) -> bool:
        """Whether a caller may list a directory."""
        return self.permissions.may_list(path, caller.uid, caller.groups)

    def same_tenant(self, key: str, other: str) -> bool:
        """Whether a file belongs to no tenant, or to the same one as another."""
        return self.permissions.tenant(key) in {None, self.permissions.tenant(other)}


def readable_by(authorisation: Authorisation, caller: Callable[[], Caller]) -> Callable[[str], bool]:
    """A function that returns whether a caller may read a key's file. It calls *caller* at most once."""
    known: Caller | None = None

    def readable(key: str) -> bool:
        nonlocal known
        known = known or caller()
        return authorisation.may_read(key, known)

    return readable
