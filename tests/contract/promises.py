"""The table of what the contract suite shows: which promise of the protocol, of which store, on which server.

Tests have the marker ``promise``. ``python -m tests.contract.promises`` writes the table into docs/stores.md; a test
compares both.
"""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/stores.md"
BEGIN, END = "<!-- written by tests.contract.promises -->\n", "<!-- end -->\n"

PROMISES = {
    "generation pinned": "bytes of two contents of an object never mix, and a replaced one gives no bytes",
    "conditional ranged read": "the request itself names the content, and the store refuses another",
    "digest": "the store's digest of the whole object, which trimsfs compares",
    "paged listing": "a page asks for what follows the last one, and lists nothing again",
    "streaming": "bytes are valid as they arrive",
    "fetch processes": "forked processes share the store that the server has opened",
    "retry": "one wrapper retries what may pass",
    "credentials": "from where the field's own tools take them",
}
"""What each means."""
SERVERS = {
    "ceph": ("S3", "Ceph"),
    "moto": ("S3", "moto"),
    "s3": ("S3", "recorded"),
    "fake-gcs": ("gs://", "fake-gcs-server"),
    "fast-gcs": ("gs://", "an endpoint of the tests"),
    "gs": ("gs://", "recorded"),
    "azurite": ("az://", "Azurite"),
    "az": ("az://", "recorded"),
    "hub": ("hf://", "a fake hub"),
    "oci": ("oci://", "docker-registry"),
    "oci-tar": ("oci://", "docker-registry"),
    "directory": ("directory", "local files"),
    "fsspec": ("fsspec", "local files"),
}
"""Store and server, by the parameters of tests. What is recorded is an answer that a test gives, of documented form."""
STORES = list(dict.fromkeys(store for store, _ in SERVERS.values()))
NOTES = {
    ("gs://", "paged listing"): "fake-gcs-server repeats all directories on each page; Google counts them.",
    ("oci://", "digest"): "The SHA-256 of whole layers. Files in a tar layer have none of their own.",
    ("directory", "conditional ranged read"): "Files know no conditions: the store compares inode, size and times "
    "after each read, and passes bytes on only then.",
    ("directory", "digest"): "File systems tell none.",
    ("directory", "streaming"): "Only after a read it is known that the file has not changed.",
    ("directory", "credentials"): "Those of the mounting user: [Directories](operations.md#directories-as-stores).",
    ("fsspec", "conditional ranged read"): "fsspec has none: one more request after each read compares.",
    ("fsspec", "digest"): "fsspec has no common form of one.",
    ("fsspec", "paged listing"): "fsspec has no pages: each page lists the directory anew.",
    ("fsspec", "streaming"): "As for a directory.",
    ("fsspec", "fetch processes"): "Some implementations start threads at once: each process opens its own store.",
    ("fsspec", "credentials"): "Those of each implementation; none is tried here.",
}
"""Why a promise is not kept, or not shown as it is for other stores."""

Shown = dict[tuple[str, str], list[str]]
"""The names of the servers that show a promise, by store and promise."""


def promised(item: pytest.Item) -> Iterable[tuple[str, str, str]]:
    """Store, promise and server that a test shows.

    Its marker's ``on`` names the server if no parameter does, or in a tuple those of the parameters that count.
    """
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    used = [value for value in parameters if isinstance(value, str) and value in SERVERS]
    for marker in item.iter_markers("promise"):
        on = marker.kwargs.get("on", used)
        for name in [on] if isinstance(on, str) else set(on) & set(used):
            yield (SERVERS[name][0], marker.args[0], SERVERS[name][1])


def table(shown: Mapping[tuple[str, str], list[str]]) -> str:
    """The table in Markdown, with its notes."""
    notes = list(dict.fromkeys(NOTES.values()))
    lines = [f"| promise | {' | '.join(STORES)} |", f"|---|{'---|' * len(STORES)}"]
    for promise, meaning in PROMISES.items():
        cells = []
        for store in STORES:
            servers, note = shown.get((store, promise), []), NOTES.get((store, promise))
            number = f" [{notes.index(note) + 1}]" if note else ""
            cells.append((", ".join(sorted(servers)) or "no") + number)
        lines.append(f"| **{promise}**: {meaning} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""])


def written(page: str, shown: Shown) -> str:
    """The page with the table in its place."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(shown)}\n{END}{rest.partition(END)[2]}"


class _Collector:
    def __init__(self) -> None:
        self.found: list[tuple[str, str, str]] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.found = [promise for item in session.items for promise in promised(item)]


def collected() -> Shown:
    """What the tests of this directory show if they pass; found in a process of its own."""
    command = [sys.executable, "-m", "tests.contract.promises", "--collect"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return gathered(json.loads(done.stdout))


def gathered(found: Iterable[Iterable[str]]) -> Shown:
    """Servers by store and promise."""
    shown: Shown = {}
    for store, promise, server in found:
        servers = shown.setdefault((store, promise), [])
        if server not in servers:
            servers.append(server)
    return shown


def main() -> None:
    """Write the table, or with ``--collect`` print what it is made of."""
    if sys.argv[1:] != ["--collect"]:
        PAGE.write_text(written(PAGE.read_text(), collected()))
        return
    collector: Any = _Collector()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/contract"], plugins=[collector])
    if status:
        sys.exit(said.getvalue())
    print(json.dumps(collector.found))


if __name__ == "__main__":
    main()
