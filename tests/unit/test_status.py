"""``trimsfs status`` without a mount: what it tells of the log."""

import os
from functools import partial
from pathlib import Path

import pytest

from tests.support.users import STRANGER, as_user
from trimsfs.cli.status import log_place


def test_a_log_that_is_a_file_is_told_also_to_who_may_not_look_for_it(tmp_path: Path) -> None:
    file = tmp_path / "logs/models.log"
    file.parent.mkdir(mode=0o700)
    assert log_place(str(file)) == "to standard error of its unit, container or terminal"
    file.touch()
    assert log_place(str(file)) == str(file)
    if os.geteuid() != 0:
        pytest.skip("needs root")
    assert as_user(STRANGER, partial(log_place, str(file))) == str(file)
