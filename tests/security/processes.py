"""The processes of a mount: those that are there as long as it is, and those that come and go."""

from tests.support.mounts import MountedStore
from tests.support.processes import family
from trimsfs.processes import title_of

LASTING = ("keeper", "server", "standby", "broker", "spawner")


def processes(mount: MountedStore) -> tuple[set[int], set[int]]:
    """Those that last, and the others: a fetch process ends when it has had nothing to do for a while."""
    pids = set(family(mount.control()["keeper_pid"]))
    lasting = {pid for pid in pids if title_of(pid).startswith(tuple(f"trimsfs {role} " for role in LASTING))}
    return lasting, pids - lasting
