"""Signals to programs that wait for a mount: those that end them, and those that they go on after."""

import contextlib
import hashlib
import io
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.processes import states
from tests.reliability.scenes import at_rest
from tests.services.ceph import Ceph
from tests.services.fast import start_fast
from tests.services.switch import Switch, switched
from tests.support.mounts import MountedStore, mounted
from tests.support.survival import Survived

MODEL = random.Random(11).randbytes(20 << 20)
WARM = random.Random(12).randbytes(3 << 20)
ASKER = Path(__file__).with_name("asker.py")
INTERRUPTED = Path(__file__).with_name("interrupted.py")
HELD_S = 0.7
"""How long programs wait before they are killed."""
AT_ONCE_S = 15.0
"""A process that has not gone by then hangs: the store may be silent for four times as long."""
SILENCE_S = 60
FOR_NAMES = ("list", "stat", "attribute")
KINDS = {"stream": (*FOR_NAMES, "read", "touch"), "wait": (*FOR_NAMES, "open")}


Program = subprocess.Popen[str]


def check_end(kind: str, program: Program) -> None:
    """Wait for the end of a program, which has found what it should."""
    seen = program.communicate(timeout=AT_ONCE_S)[0].strip()
    wanted = hashlib.sha256(MODEL).hexdigest() if kind in {"read", "touch"} else "done"
    assert (program.returncode, seen) == (0, wanted), kind


@contextlib.contextmanager
def asking(mount: MountedStore, kinds: tuple[str, ...], number: int) -> Iterator[dict[str, Program]]:
    """Programs by their kinds that each ask for something of which nothing is known yet."""
    programs: dict[str, Program] = {}
    try:
        for kind in kinds:
            path = mount.path / f"{kind}-{number}" if kind != "stat" else mount.path / f"stat-{number}/x"
            command = [sys.executable, str(ASKER), kind, str(path)]
            programs[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for kind, program in programs.items():
            assert program.stdout is not None
            assert program.stdout.readline() == "asking\n", kind
        yield programs
    finally:
        for program in programs.values():
            program.kill()
            program.communicate(timeout=AT_ONCE_S)


@pytest.fixture
def bucket_of_models(ceph: Ceph, bucket: str) -> str:
    """A bucket with a file or directory for each kind of program that may ask, twice."""
    with contextlib.closing(ceph.client()) as client:
        client.upload_fileobj(io.BytesIO(WARM), bucket, "warm")
        for number in range(2):
            for kind in ("read", "touch", "open", "attribute"):
                client.upload_fileobj(io.BytesIO(MODEL), bucket, f"{kind}-{number}")
            for kind in ("list", "stat"):
                client.put_object(Bucket=bucket, Key=f"{kind}-{number}/x", Body=b"x")
    return bucket


@contextlib.contextmanager
def held(switch: Switch) -> Iterator[None]:
    """Nothing comes from the store."""
    switch.hold()
    try:
        yield
    finally:
        switch.let_go()


@pytest.mark.parametrize("cold_open", ["stream", pytest.param("wait", marks=pytest.mark.slow)])
def test_a_process_that_is_killed_goes_at_once_whatever_it_waits_for(
    cold_open: str, ceph: Ceph, bucket_of_models: str, tmp_path: Path, survived: Survived
) -> None:
    options = ("--cold-open", cold_open, f"stall_timeout={SILENCE_S}", "--retry-deadline", f"{SILENCE_S}")
    with (
        switched(ceph) as (server, switch),
        mounted(f"s3://{bucket_of_models}", tmp_path, *options, environment=server.environment()) as mount,
    ):
        assert (mount.path / "warm").read_bytes() == WARM
        with (
            held(switch),
            asking(mount, KINDS[cold_open], 0) as killed,
            asking(mount, KINDS[cold_open], 1) as patient,
        ):
            time.sleep(HELD_S)
            waiting = [*killed.values(), *patient.values()]
            assert [program.args for program in waiting if program.poll() is not None] == []
            for program in killed.values():
                program.kill()
            began = time.monotonic()
            for program in killed.values():
                program.wait(timeout=AT_ONCE_S)
            took = time.monotonic() - began
            assert "D" not in states(program.pid for program in killed.values()).values()
            assert (mount.path / "warm").read_bytes() == WARM
            assert [kind for kind, program in patient.items() if program.poll() is not None] == []
            switch.let_go()
            for kind, program in patient.items():
                check_end(kind, program)
        at_rest(mount)
    survived(
        f"SIGKILL while waiting, cold opens {cold_open}",
        injected=len(killed),
        operations=len(patient) + 2,
        recovery_s=took,
    )


@pytest.mark.parametrize("cold_open", [pytest.param("stream", marks=pytest.mark.slow), "wait"])
def test_signals_that_a_program_goes_on_after_cost_it_nothing_but_opens_to_be_made_again(
    cold_open: str, tmp_path: Path, survived: Survived
) -> None:
    """A store that is slow, emulated, and three hundred signals a second."""
    bucket = tmp_path / "buckets/bucket"
    for restart in ("yes", "no"):
        (bucket / f"directory-{restart}").mkdir(parents=True)
        (bucket / f"directory-{restart}/x").write_bytes(b"x")
        (bucket / f"model-{restart}").write_bytes(MODEL)
    told = []
    with (
        start_fast(bucket.parent, latency_ms=150, rate=20 << 20) as server,
        mounted("s3://bucket", tmp_path / "mount", "--cold-open", cold_open, environment=server.environment()) as mount,
    ):
        for restart in ("yes", "no"):
            paths = (mount.path / f"model-{restart}", mount.path / f"directory-{restart}")
            command = [sys.executable, *map(str, (INTERRUPTED, *paths)), restart]
            done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
            told.append(json.loads(done.stdout))
        at_rest(mount)
    interrupted: Counter[str] = Counter()
    for one in told:
        interrupted.update(one["interrupted"])
        assert one["short"] == 0
    # FUSE cannot have a call restarted: an open that waits ends with EINTR, also for who has asked for SA_RESTART.
    assert interrupted.keys() == ({"open"} if cold_open == "wait" else set())
    survived(
        f"signals that are handled, cold opens {cold_open}",
        injected=sum(one["signals"] for one in told),
        operations=2 * len(MODEL) >> 20,
        errors=Counter({"EINTR": interrupted["open"]} if interrupted["open"] else {}),
        allowed=["EINTR"],
        wrong=sum(one["digest"] != hashlib.sha256(MODEL).hexdigest() for one in told),
    )
