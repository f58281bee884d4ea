"""Names that somebody chooses with bad intent, and what a log is to look like all the same."""

import re

FORGED = "2026-01-02 03:04:05,678 ERROR trimsfs.server.lifecycle: forged"
"""A line that looks like one of the log."""

FILES = (
    f"new\n{FORGED}",
    "carriage\rreturn",
    "escape\x1b[41;93mred\x1b]0;title\x07",
    "bidi\u202eexe.gnp",
    "separator\u2028line",
    "next\x85line",
    "-rf",
    "--help",
    "$(touch owned)`touch owned`;touch owned|&",
    "'quoted\"",
    "[red]markup[",
    "back\\slash",
    "tab\t",
    " lead and trail ",
    "~",
    "%2e%2e%2fetc",
    '{le="0.1"} 1 #',
    "x" * 255,
    "é" * 127,
)
"""What can be a file, whatever it looks like."""
LOUD = FILES[:6]
"""Those that do something where they are shown."""

HIDDEN = (".", "..", ".trims", "y" * 256, "é" * 128)
"""What cannot be a file's name."""

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: .+|trimsfs: .+| {2}.*")
"""A line of the log: what a server says, a keeper, or the traceback of what was said before."""


def check_log(text: str) -> None:
    """That each line of a log is one that was logged."""
    for line in text.split("\n")[:-1]:
        assert LINE.fullmatch(line), ascii(line)
        assert line.isprintable(), ascii(line)
    assert f"\n{FORGED}" not in text
