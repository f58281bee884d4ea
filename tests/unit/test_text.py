"""Names of others, as people are shown them."""

import errno
import logging
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from trimsfs.control.metrics import renderer
from trimsfs.text import LineFormatter, or_free_space, printable

TITLE = r"""
import os, sys
from pathlib import Path
from trimsfs.text import set_process_title
set_process_title("server", Path(os.fsdecode(sys.stdin.buffer.read())))
print(Path("/proc/self/cmdline").read_text().rstrip("\0"), os.environ["KEPT"], sep="\n")
"""


@given(st.text())
def test_any_text_is_one_line_that_does_nothing(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_what_is_shown_as_itself_stays() -> None:
    assert printable("résumé [v2] \\n") == "résumé [v2] \\n"
    assert printable("a\nb\x1b[2J\u202e\udcff") == "a\\nb\\x1b[2J\\u202e\\udcff"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space, or set --log-file"),
        (errno.EDQUOT, "free some space, or set --log-file"),
        (errno.EROFS, "set --log-file"),
    ],
)
def test_a_full_disk_has_a_remedy_of_its_own(number: int, remedy: str) -> None:
    assert or_free_space(OSError(number, ""), "set --log-file") == remedy


@pytest.mark.parametrize(
    ("mountpoint", "shown"),
    [
        (b"/mnt/r\xc3\xa9sum\xc3\xa9 [v2]", "/mnt/résumé [v2]"),
        (b"/a\nroot 1 /sbin/init\x1b[2J\xff", r"/a\nroot 1 /sbin/init\x1b[2J\udcff"),
        (b"/" + b"x" * 4000, None),
    ],
)
def test_a_process_is_shown_by_its_role_and_mountpoint(mountpoint: bytes, shown: str | None) -> None:
    """One that finds too little memory is cut; what it needs of its environment stays."""
    done = subprocess.run(
        [sys.executable, "-c", TITLE],
        input=mountpoint,
        env={"KEPT": "as it was"},
        capture_output=True,
        timeout=60,
        check=True,
    )
    title, kept = done.stdout.decode().splitlines()
    assert title.startswith("trimsfs server /")
    assert title == f"trimsfs server {shown}" if shown else f"trimsfs server /{'x' * 3000}".startswith(title)
    assert kept == "as it was"


@given(st.text(), st.text())
def test_a_record_is_one_line_and_what_it_raised_is_indented(name: str, cause: str) -> None:
    try:
        raise ValueError(cause)
    except ValueError as error:
        raised = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("test", logging.ERROR, "", 0, "%s", (name,), raised)
    first, *others = LineFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert first.isprintable()
    assert first.startswith("ERROR ")
    assert all(line.startswith("  ") and line.isprintable() for line in others)


@dataclass(frozen=True)
class Statistics:
    """Of one tenant."""

    tenant_used_bytes: dict[str, int]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: not name.endswith("/")))
@example('evil"} 1\ntrimsfs_disk_used_bytes 999\\')
def test_any_name_can_be_the_label_of_a_metric(name: str) -> None:
    text = b"".join(renderer({"disk": lambda: Statistics({f"{name}/": 7})})()).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert [(sample.labels, sample.value) for sample in samples] == [({"tenant": name}, 7)]
