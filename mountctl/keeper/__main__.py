"""``python -m mountctl.keeper``: runs a keeper, with its order as JSON on standard input.

With ``--recover``, the keeper takes over the mount and the order of a killed keeper. With ``--hold``, it waits for
servers that another process starts; with ``--launch``, this is that process.
"""

import argparse
import json
import os
import resource
import sys
from pathlib import Path

from mountctl.keeper.keeper import Keeper
from mountctl.keeper.servers.forked_server import adopt_orphans
from mountctl.keeper.servers.server_source import OwnServers
from mountctl.keeper.succession.successor import follow
from mountctl.linux.sd_notify import stored_descriptors
from trimsfs.text import set_process_title


def _leave_no_core() -> None:
    """Stop the kernel from dumping core of this process and its servers, which have credentials in memory.

    A limit of 0 does not stop programs that read cores from a pipe; a limit of 1 does.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    most = 1 if hard == resource.RLIM_INFINITY else min(hard, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))


def _may_open_files() -> None:
    """Raise the limit of open files, for this process and its servers, as far as it may be."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="mountctl.keeper")
    parser.add_argument("--status-fd", type=int)
    parser.add_argument("--recover", type=Path, metavar="MOUNTPOINT")
    parser.add_argument("--hold", type=Path, metavar="MOUNTPOINT")
    parser.add_argument("--launch", action="store_true")
    arguments = parser.parse_args()
    status: int | None = arguments.status_fd
    if status is not None:
        os.set_inheritable(status, False)
    _leave_no_core()
    _may_open_files()
    adopt_orphans()
    if arguments.recover is not None:
        set_process_title("keeper", arguments.recover)
        sys.exit(follow(arguments.recover, status))
    if arguments.hold is not None:
        from mountctl.keeper.launching.standalone_keeper import hold  # noqa: PLC0415 - others need no memory for it

        set_process_title("keeper", arguments.hold)
        sys.exit(hold(arguments.hold))
    order = json.load(sys.stdin)
    if arguments.launch:
        from mountctl.keeper.launching.launcher import launch  # noqa: PLC0415 - keepers need no memory for it

        set_process_title("launcher", Path(order["mountpoint"]))
        sys.exit(launch(order))
    set_process_title("keeper", Path(order["mountpoint"]))
    sys.exit(Keeper(order, OwnServers(), status, stored_descriptors(os.environ)).run())


if __name__ == "__main__":
    main()
