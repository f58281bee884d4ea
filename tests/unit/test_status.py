"""``trimsfs status`` without a mount: what it tells of a fleet."""

from trimsfs.cli.watch.status import told_of_fleet


def test_a_fleet_is_told_with_what_keeps_this_host_out_of_it() -> None:
    member = {"address": "10.0.0.1:7443", "problem": None, "received_bytes": 0, "strikes": 0}
    facts = {"name": "f", "on": True, "drained": False, "me": "10.0.0.1:7443", "members": [member]}
    assert told_of_fleet(facts, 0) == ["f, 1 member: 0 bytes from others, 0 bytes sent"]
    assert told_of_fleet(facts | {"drained": True}, 0)[0].endswith("sent; drained: `mountctl fleet undrain`")
    assert told_of_fleet(facts | {"problem": "No such file"}, 0)[1:] == [
        "members not read: No such file: see fleet_members"
    ]
    assert told_of_fleet(facts | {"on": False}, 0) == ["f, 1 member: off: turn it on by `trimsfs fleet on`"]
