"""Names of others, as people are shown them."""

import logging

from hypothesis import given
from hypothesis import strategies as st

from trimsfs.text import LineFormatter, printable


@given(st.text())
def test_any_text_is_one_line_that_does_nothing(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_what_is_shown_as_itself_stays() -> None:
    assert printable("résumé [v2] \\n") == "résumé [v2] \\n"
    assert printable("a\nb\x1b[2J\u202e\udcff") == "a\\nb\\x1b[2J\\u202e\\udcff"


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
