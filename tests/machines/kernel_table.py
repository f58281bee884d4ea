"""Write the table of kernels and features in the docs from what hosts have shown: run it with ``python -m``."""

import enum
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.machines.images import version

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/operations.md"
RESULTS = ROOT / "build/machines/results.jsonl"
BEGIN, END = "<!-- written by tests.machines.kernel_table -->\n", "<!-- end -->\n"


class Feature(enum.StrEnum):
    """What is tried on each host: a row of the table."""

    PASSTHROUGH = "reads by the kernel alone (passthrough)"
    READS = "cold, warm and mapped reads"
    S3 = "S3"
    EVICTION = "eviction under a budget"
    RESTART = "another server takes over (`mountctl restart`)"
    KILL = "the server is killed (`kill -9`)"
    UPGRADE = "upgrade"
    USER = "mount of a user (`fusermount3`)"
    CONTAINER = "container (podman, bind mount)"
    FSTAB = "fstab"
    TENANTS = "access rules and tenants"
    MEMORY_HIGH = "a reader with less memory than its model (`memory.high`)"
    EXT4 = "cache on ext4"
    XFS = "cache on xfs"
    BTRFS = "cache on btrfs"
    BOOT = "boot: a declared mount, and one in fstab"


@dataclass(frozen=True, slots=True)
class Result:
    """What a kind of host, by its name and the release of its kernel, has shown of a feature on a date."""

    host: str
    release: str
    date: str
    feature: str
    cell: str

    def line(self) -> str:
        """As a line of RESULTS."""
        return json.dumps(asdict(self)) + "\n"


def main() -> None:
    """Write the table into the docs."""
    results = [Result(**json.loads(line)) for line in RESULTS.read_text().splitlines()]
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def table(results: list[Result]) -> str:
    """The results of each host's last day and kernel, as a table with a column for each host."""
    hosts = list(dict.fromkeys(result.host for result in sorted(results, key=lambda result: version(result.release))))
    releases = {result.host: result.release for result in results}
    dates = {result.host: result.date for result in results}
    cells = {
        (result.feature, result.host): result.cell
        for result in results
        if (result.release, result.date) == (releases[result.host], dates[result.host])
    }
    rows = [
        ["", *hosts],
        ["---"] * (len(hosts) + 1),
        ["kernel", *(releases[host] for host in hosts)],
        *([feature, *(cells.get((feature, host), "not run") for host in hosts)] for feature in Feature),
        ["run on", *(dates[host] for host in hosts)],
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
