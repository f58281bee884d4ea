"""Pods whose memory is limited below the size of a model read it, and nothing is killed.

The readers are in control groups, whose limits the kernel heeds. There are no other parts of pods but the volume. On a
host whose control groups are of version 1, memory.high is left out.
"""

import hashlib
import os
import random
import sys
from pathlib import Path

import pytest

from tests.csi.driver import needs_root
from tests.kubernetes import throttled
from tests.support.mounts import TRIMSFS, mounted
from tests.support.processes import run

pytestmark = [needs_root, pytest.mark.alone]  # it empties the page cache

CONTENT = random.Random(1).randbytes(3 * throttled.LIMIT)


def test_a_pod_limited_below_a_model_s_size_reads_it(store_directory: Path, tmp_path: Path) -> None:
    try:
        with throttled.group("max"):
            pass
    except OSError as error:
        pytest.skip(f"no control group with a limit of memory can be made: {error}")
    (store_directory / "model").write_bytes(CONTENT)
    with mounted(store_directory, tmp_path, "--min-free", "0") as mount:
        command = [sys.executable, throttled.__file__, str(mount.path / "model")]
        done = run(*command, env=os.environ | {"PATH": f"{Path(TRIMSFS).parent}:{os.environ['PATH']}"}, timeout=200)
    assert done.returncode == 0, done.stderr
    print(throttled.checked(done.stdout, hashlib.sha256(CONTENT).hexdigest(), throttled.limits()))
