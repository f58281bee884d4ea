"""What `trimsfs top` makes of the answers of mounts."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from trimsfs.cli.main import main
from trimsfs.cli.watch import screen, top
from trimsfs.cli.watch.sample import PAUSES, RATES, History, Model, Sample, Wait
from trimsfs.errors import NotMountedError
from trimsfs.exit_codes import exit_code
from trimsfs.mountinfo import Mount

MIB = 1 << 20
MOUNT = Mount(number=7, parent=1, mountpoint=Path("/models"), device="0:1", kind="fuse.trimsfs", source="s3://b")
FIRST = Sample(
    taken=10.0,
    facts={"server_pid": 1, "store_problem": None},
    metrics={"trimsfs_fetch_fetched_bytes_total": 4 * MIB, "trimsfs_fetch_in_flight": 1, "trimsfs_fetch_rate": MIB},
    models={
        "/models/a": Model(files=1, size=4 * MIB, disk=MIB, uses=9),
        "/models/b": Model(files=2, size=9 * MIB, disk=3 * MIB, host=MIB, pinned=1, open=1, users={5: "python 5"}),
    },
    jobs=[],
    waits=[],
)


def later(seconds: float, fetched: int, **changes: int) -> Sample:
    """A sample after the first, when more has been fetched."""
    models = dict(FIRST.models)
    for name, disk in changes.items():
        models[f"/models/{name}"] = replace(models[f"/models/{name}"], disk=disk)
    metrics = dict(FIRST.metrics) | {"trimsfs_fetch_fetched_bytes_total": fetched}
    return replace(FIRST, taken=FIRST.taken + seconds, metrics=metrics, models=models)


def history(*answers: Sample | NotMountedError) -> History:
    found = History(MOUNT, 2.0)
    for answer in answers:
        found.answered(answer, 10.0)
    return found


def test_rates_follow_from_two_samples() -> None:
    found = history(FIRST, later(2.0, 8 * MIB, a=2 * MIB, b=MIB))

    assert list(found.rates) == [2 * MIB]
    assert list(history(FIRST, replace(later(2.0, 0), facts={"server_pid": 2})).rates) == []  # which counts anew
    assert {path: list(rates) for path, rates in found.models.items()} == {"/models/a": [MIB / 2], "/models/b": [0]}


def test_a_mount_that_answers_slowly_is_asked_less_often() -> None:
    found = History(MOUNT, 2.0)
    found.asked = 100.0
    found.answered(FIRST, 100.1)
    assert found.due == 102.0
    found.answered(later(1.0, 4 * MIB), 101.0, mounts=3)
    assert found.due == 101.0 + 3 * PAUSES
    found.answered(NotMountedError("hangs"), 110.0, mounts=3)
    assert found.due == 110.0 + PAUSES * 10.0


@pytest.mark.parametrize(("order", "first"), [("n", "a"), ("u", "a"), ("o", "b"), ("s", "b"), ("h", "b"), ("f", "a")])
def test_models_are_in_the_order_that_a_key_asks_for(order: str, first: str) -> None:
    rows = screen.ranked([history(FIRST, later(2.0, 8 * MIB, a=2 * MIB))], order)
    assert Path(rows[0][0]).name == first


def test_a_sparkline_goes_from_nothing_to_the_most() -> None:
    assert screen.sparkline([]) == " " * RATES
    assert screen.sparkline([0, 0]) == " " * RATES
    assert screen.sparkline([0, 1, 50, 100]).lstrip() == "▁▄█"


def test_lines_tell_problems_waits_and_silence() -> None:
    sample = replace(
        FIRST,
        facts={"server_pid": 1, "store_problem": "503"},
        waits=[Wait("python 5", Path("/models/b"), 1.0), Wait("sh 6", Path("/models/c"), 2.0)],
        jobs=[
            {"id": "f00", "command": "pin", "path": "/models/a", "done_bytes": 0, "total_bytes": 1, "waiting": "503"}
        ],
    )
    lines = [*screen.lines(history(sample), 11.0, asked=False)]
    assert any(", memory 1.0 MB, " in line for line in lines)  # the sum of what models have there
    assert "  problem  store: 503" in lines
    assert lines[-3:] == [
        "  waits    sh 6 for /models/c: 3.0 s",
        "  waits    python 5 for /models/b: 2.0 s",
        "  job      f00 pin /models/a, 0 bytes of 1 byte: 503",
    ]
    assert "no answer for 9 s; before:" in [*screen.lines(history(sample), 9.0, asked=True)][1]
    assert [line.split()[0] for line in screen.lines(history(sample), 11.0, asked=False, brief=True)] == [
        "/models:",
        *("problem", "waits", "waits", "job"),
    ]
    assert [*screen.lines(history(FIRST, NotMountedError("gone")), 9.0, asked=False)][1:] == ["  not answering: gone"]


@pytest.mark.parametrize("height", [3, 8, 24])
@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_view_fits_its_terminal_and_shows_what_is_chosen(width: int, height: int) -> None:
    models = {f"/m{number:02}": Model(files=1, size=MIB) for number in range(40)}
    rows = screen.ranked([history(replace(FIRST, models=models))], "n")
    console = Console(width=width, height=height)
    with console.capture() as capture:
        console.print(screen.view(["above"] * 3, rows, "/m31", "below", (width, height)))
    shown = capture.get().splitlines()
    assert len(shown) <= max(height, 5)
    assert all(len(line.rstrip()) <= width for line in shown)
    assert any("/m31" in line for line in shown)
    assert shown[-1].strip() == "below"


def test_a_mount_that_does_not_answer_is_named_with_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(MOUNT, number=8, mountpoint=Path("/other"), device="0:2")

    def ask(mount: Mount) -> Sample:
        if mount is other:
            raise NotMountedError("/other does not answer")
        return FIRST

    monkeypatch.setattr(top, "file_systems", lambda: [MOUNT, other])
    monkeypatch.setattr(top, "take_sample", ask)
    done = CliRunner().invoke(main, ["top"])
    assert done.exit_code == exit_code(NotMountedError.__name__)
    assert done.stderr == "trimsfs: left out: /other does not answer\n"
    assert "/models/b" in done.stdout
    assert "1 files" in done.stdout
