"""What `make audit` makes of what pip-audit says."""

from typing import Any

import pytest

from tests.security.audit import CLEAN, FLAWED, NOT_ASKED, outcome

FINE = {"name": "fine", "version": "1", "vulns": []}
FLAW = {"name": "flawed", "version": "1", "vulns": [{"id": "CVE-0", "fix_versions": ["2"]}]}
SKIPPED = {"name": "skipped", "skip_reason": "Dependency not found on PyPI"}
OURS = {"name": "trimsfs", "skip_reason": "distribution marked as editable"}


@pytest.mark.parametrize(
    ("dependencies", "code"),
    [
        ([FINE, OURS], CLEAN),
        ([FINE, FLAW], FLAWED),
        ([FLAW, SKIPPED], FLAWED),
        ([FINE, SKIPPED], NOT_ASKED),
        ([OURS], NOT_ASKED),
        ([], NOT_ASKED),
        (None, NOT_ASKED),
    ],
)
def test_what_could_not_be_asked_is_not_taken_for_clean(dependencies: list[Any] | None, code: int) -> None:
    found, lines = outcome(None if dependencies is None else {"dependencies": dependencies})
    assert (found, len(lines)) == (code, 1)
