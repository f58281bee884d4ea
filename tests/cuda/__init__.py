"""Emulated CUDA devices for tests where there is no GPU: a test double at the ABI of libcuda.so.1.

    with KernelDriver(directory, [64 << 20]) as kernel:
        subprocess.run([...], env=os.environ | environment(kernel))

Processes with this environment find devices named "Emulated device N, no GPU", through cuda-bindings or whatever else
loads ``libcuda.so.1``. Memory, copies and sharing between processes work; nothing is ever computed. All
bytes of new memory are `STALE`.

| variable | |
|---|---|
| `EMULATED_CUDA` | the socket of the kernel driver; without it there is no device |
| `EMULATED_CUDA_TRANSPARENT` | the host can use device pointers, as far as access is granted; it faults otherwise |
| `CUDA_VISIBLE_DEVICES` | as for a true driver: indices or UUIDs |
"""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from tests.support.shared_by_run import MARK, shared_by_run

from .kernel import Device, KernelDriver
from .memory import STALE, Allocation
from .registers import GRANULARITY

__all__ = ["GRANULARITY", "STALE", "Allocation", "Device", "KernelDriver", "environment", "library"]

_DIRECTORY = Path(__file__).parent
STRICT = ["-std=gnu11", "-Wall", "-Wextra", "-Wconversion", "-Werror"]


def library(*flags: str) -> Path:
    """The library, compiled when its sources have changed, at a place that all users may read."""
    sources = sorted(_DIRECTORY.glob("*.[ch]"))
    content = "\0".join([*flags, *(source.read_text() for source in sources)])
    directory = _directory() / hashlib.sha256(content.encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    for path in (directory.parent, directory):
        path.chmod(0o755)
    target = directory / "libcuda.so.1"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = target.with_name("made")
            options = ["-O1", "-g", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
            inputs = [source for source in sources if source.suffix == ".c"]
            subprocess.run(["gcc", *STRICT, *options, *flags, "-o", made, *inputs, "-ldl"], timeout=120, check=True)
            made.chmod(0o755)
            made.rename(target)
    return target


def _directory() -> Path:
    """Where the library is: of a run of the tests, in what goes with it."""
    run = os.environ.get(MARK)
    return shared_by_run(run) if run else Path(tempfile.gettempdir()) / f"trimsfs-emulated-cuda-{os.getuid()}"


def environment(kernel: KernelDriver | None, *, transparent: bool = False) -> dict[str, str]:
    """The variables by which processes have the devices of a kernel driver; of None, a driver without devices."""
    path = os.environ.get("LD_LIBRARY_PATH")
    return (
        {"LD_LIBRARY_PATH": f"{library().parent}{f':{path}' if path else ''}"}
        | ({"EMULATED_CUDA": str(kernel.path)} if kernel else {})
        | ({"EMULATED_CUDA_TRANSPARENT": "1"} if transparent else {})
    )
