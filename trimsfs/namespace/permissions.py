"""Permissions: owner, group and mode of files and directories, by patterns of their paths."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from trimsfs.options import MountOptions, searchable

LATELY = 8192
"""Paths whose ownership is cached."""
_READ, _SEARCH = 0o4, 0o1


@dataclass(frozen=True, slots=True)
class Ownership:
    """Owner, group and permission bits of a file or directory."""

    uid: int
    gid: int
    mode: int

    def grants(self, bits: int, uid: int, groups: Set[int]) -> bool:
        """Whether a user with these groups has these permission *bits*, by the kernel's rules."""
        shift = 6 if uid == self.uid else 3 if self.gid in groups else 0
        return (self.mode >> shift) & bits == bits


class Permissions:
    """The ownership of paths on a mount, by its options."""

    def __init__(self, options: MountOptions) -> None:
        self._default = options
        self._rules = [(tuple(rule.path.split("/")), rule) for rule in options.access]
        self._tenants = sorted((f"{tenant.path}/" for tenant in options.tenants), key=len, reverse=True)
        self._of = lru_cache(maxsize=LATELY)(self._decide)

    def of(self, path: str, *, directory: bool) -> Ownership:
        """The ownership of a path, without a leading slash; a directory's may end with one."""
        return self._of(path.rstrip("/") if self._rules else "", directory)

    def _decide(self, path: str, directory: bool) -> Ownership:
        options = self._default
        uid, gid, mode, dir_mode = options.uid or 0, options.gid or 0, options.mode, options.dir_mode or 0
        parts = path.split("/") if path else []
        for pattern, rule in self._rules:
            if _matches(pattern, parts):
                uid = uid if rule.uid is None else rule.uid
                gid = gid if rule.gid is None else rule.gid
                if rule.mode is not None:
                    mode, dir_mode = rule.mode & 0o555, searchable(rule.mode)
                if rule.dir_mode is not None:
                    dir_mode = rule.dir_mode
        return Ownership(uid, gid, dir_mode if directory else mode)

    def tenant(self, path: str) -> str | None:
        """The tenant of a path, by its longest directory; None if there is none."""
        return next((prefix for prefix in self._tenants if path.startswith(prefix)), None)

    def may_read(self, path: str, uid: int, groups: Set[int]) -> bool:
        """Whether a user can open the file at a path: read it, and search every directory above it."""
        if not self._rules or self._may_all(uid, groups):
            return True
        return self.of(path, directory=False).grants(_READ, uid, groups) and self._may_enter(path, uid, groups)

    def may_list(self, path: str, uid: int, groups: Set[int]) -> bool:
        """Whether a user can list the directory at a path and look up names in it."""
        if self._may_all(uid, groups):
            return True
        path = path.rstrip("/")
        granted = self.of(path, directory=True).grants(_READ | _SEARCH, uid, groups)
        return granted and self._may_enter(path, uid, groups)

    def _may_all(self, uid: int, groups: Set[int]) -> bool:
        return uid in {0, self._default.uid} or self._default.control_gid in groups

    def _may_enter(self, path: str, uid: int, groups: Set[int]) -> bool:
        """Whether a user can search every directory above a path."""
        parts = path.split("/")
        above = ("/".join(parts[:count]) for count in range(len(parts)))
        return all(self.of(directory, directory=True).grants(_SEARCH, uid, groups) for directory in above)


def _matches(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a pattern matches a path, or a directory above it."""
    return len(parts) >= len(pattern) and all(map(fnmatchcase, parts, pattern))
