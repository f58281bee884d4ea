"""``trimsfs status`` without a mount: what it tells of the log and of a fleet."""

import os
from functools import partial
from pathlib import Path

import pytest

from tests.support.users import STRANGER, as_user
from trimsfs.cli.status import log_place, told_of_fleet


def test_a_log_that_is_a_file_is_told_also_to_who_may_not_look_for_it(tmp_path: Path) -> None:
    file = tmp_path / "logs/models.log"
    file.parent.mkdir(mode=0o700)
    assert log_place(str(file)) == "to standard error of its unit, container or terminal"
    file.touch()
    assert log_place(str(file)) == str(file)
    if os.geteuid() != 0:
        pytest.skip("needs root")
    assert as_user(STRANGER, partial(log_place, str(file))) == str(file)


def test_a_fleet_is_told_with_what_keeps_this_host_out_of_it() -> None:
    member = {"address": "10.0.0.1:7443", "problem": None, "received_bytes": 0, "strikes": 0}
    facts = {"name": "f", "on": True, "drained": False, "me": "10.0.0.1:7443", "members": [member]}
    assert told_of_fleet(facts, 0) == ["f, 1 member: 0 bytes from others, 0 bytes sent"]
    assert told_of_fleet(facts | {"drained": True}, 0)[0].endswith("sent; drained: `mountctl fleet undrain`")
    assert told_of_fleet(facts | {"problem": "No such file"}, 0)[1:] == [
        "members not read: No such file: see --fleet-members"
    ]
    assert told_of_fleet(facts | {"on": False}, 0) == ["f, 1 member: off: turn it on by `trimsfs fleet on`"]
