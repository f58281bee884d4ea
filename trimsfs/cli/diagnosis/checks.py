"""What checks of ``trimsfs doctor`` share: how one that is not simply well ends, and what the server's user may do."""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from trimsfs.options import MountOptions
from trimsfs.server.sandbox import identity

Check = Callable[[MountOptions], str]
"""Checks one thing; returns what is well. Raises ProblemError, Advice, TrimsError and OSError."""


class ProblemError(Exception):
    """A check that failed: what is wrong and what to do."""


class Advice(Exception):  # noqa: N818 - not an error
    """A check that passed, though something could be better."""


def server_of(options: MountOptions) -> str:
    """The user that the server runs as, for messages."""
    if options.server_user is None:
        return "this user"
    return f"the server, which runs as {identity(options.server_user).name},"


def as_server(options: MountOptions, test: str, paths: Sequence[Path]) -> list[str]:
    """The paths for which a shell *test* of ``$one``, run by the server's user, fails.

    Only the kernel can decide this: it also consults control groups and access lists.
    """
    user = identity(options.server_user) if options.server_user is not None else None
    done = subprocess.run(
        ["/bin/sh", "-c", f'for one; do {test} || echo "$one"; done', "sh", *paths],
        cwd="/",
        user=user.uid if user else None,
        group=user.gid if user else None,
        extra_groups=user.groups if user else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()
