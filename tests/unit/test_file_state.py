"""What the client says of a file that a mount does not give."""

import errno
import os

import pytest

from trimsfs.client.file_state import explained

OUTAGE = "m/a at 0: SlowDown: Please reduce your request rate"
MISMATCH = "m/a: digest mismatch: put the right bytes back; then `trimsfs refresh`"
UNSIGNED = "m/a: no model.sig in any directory above it: sign the model"


@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [
        (errno.EIO, OUTAGE, ": try again once the store answers, see `trimsfs status`"),
        (errno.EIO, MISMATCH, ""),
        (errno.EACCES, UNSIGNED, ""),
    ],
)
def test_a_cause_with_a_remedy_of_its_own_gets_no_other(
    number: int, cause: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getxattr", lambda *_: cause.encode())
    error = explained(OSError(number, os.strerror(number)), 3, "/models/m/a")
    assert type(error) is type(OSError(number, ""))
    assert str(error) == f"[Errno {number}] {os.strerror(number)}: cannot be completed: {cause}{remedy}: '/models/m/a'"
