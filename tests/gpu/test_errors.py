"""What programs are told when a model cannot be had in a device's memory: one line, with the cause and the remedy."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import environment
from tests.gpu.mount import PREAMBLE, ROOT, TIMEOUT_S, GpuMount, error_of
from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.client import GpuError, GpuFullError, GpuLostError, copy_leases

UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"
DEVICE = cuda.DeviceInfo(ordinal=0, uuid=UUID, name="none", total=0)
TOLD: dict[str, Any] = {
    "device": UUID,
    "generation": "1",
    "memory": "vmm",
    "size": 4096,
    "nbytes": 512,
    "format": "safetensors",
    "socket": "/nowhere",
    "token": "00",
    "tensors": [{"name": "a", "dtype": "int8", "shape": [2, 3], "offset": 256, "nbytes": 6}],
}


def tensor(**facts: object) -> dict[str, Any]:
    """What is told of a copy of one tensor."""
    return TOLD | {"tensors": [TOLD["tensors"][0] | facts]}


TRY = """
try:
    trimsfs.open(path).to(DEVICE)
except GpuError as error:
    tell(str(error))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_bytes(b"content")
    return path


def take(model: Path, pattern: str | None = None, memory: str = "vmm") -> copy_leases.Lease:
    with model.open("rb", buffering=0) as file:
        return copy_leases.take(model, file, DEVICE, pattern, memory)


def offering(model: Path, told: object, name: str = UUID) -> Path:
    """Have a control file for a model, and what is told in it."""
    directory = model.parent / ".trims" / model.name / "gpu"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(told if isinstance(told, str) else json.dumps(told))
    return directory / name


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# The device


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:7", "no device cuda:7 in this process, which sees cuda:0 is GPU-"),
        (UUID, f"no device {UUID} in this process"),
        ("cpu", "unknown device 'cpu': give 'cuda', 'cuda:N', N or a UUID"),
        (-1, "unknown device '-1'"),
        ("", "unknown device ''"),
    ],
)
def test_a_device_that_is_not_there(gpu_mount: GpuMount, device: str | int, message: str) -> None:
    (told,) = gpu_mount.run(TRY.replace("DEVICE", repr(device)))
    assert told.startswith(message)


def test_a_device_that_the_program_may_not_see(gpu_mount: GpuMount) -> None:
    device = repr(gpu_mount.uuid(1))
    (told,) = gpu_mount.run(TRY.replace("DEVICE", device), CUDA_VISIBLE_DEVICES="0")
    assert "check CUDA_VISIBLE_DEVICES" in told
    assert gpu_mount.run(TRY.replace("DEVICE", device), CUDA_VISIBLE_DEVICES="1") == []


@pytest.mark.parametrize(
    ("code", "variables", "message"),
    [
        ("sys.modules['cuda'] = None", environment(None), "pip install 'trimsfs[cuda]'"),
        ("", {}, "no CUDA driver"),
        ("", environment(None), "no CUDA device"),
    ],
    ids=["no cuda-python", "no driver", "no device"],
)
def test_what_is_missing_is_named(model: Path, code: str, variables: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{PREAMBLE}{TRY.replace('DEVICE', '0')}", model],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"} | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert message in json.loads(done.stdout)


def test_a_process_without_a_place_for_temporary_files(gpu_mount: GpuMount) -> None:
    assert gpu_mount.kernel is not None
    variables = environment(gpu_mount.kernel) | {"TMPDIR": "/nowhere", "PYTHONPATH": str(ROOT)}
    places = ["--ro-bind", "/", "/", "--proc", "/proc", "--chdir", "/"]
    no_ldconfig = ["--ro-bind", "/dev/null", os.path.realpath("/sbin/ldconfig")]  # then a compiler is tried
    code = PREAMBLE + TRY.replace("DEVICE", "0")
    model = gpu_mount.mount.path / "model.safetensors"
    done = subprocess.run(
        ["bwrap", "--die-with-parent", *places, *no_ldconfig, sys.executable, "-c", code, model],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.startswith("cuda-python cannot be loaded: ")
    assert "No usable temporary directory" in told
    assert told.endswith(": set TMPDIR to a writable directory")


# The control file


def test_a_file_that_is_on_no_mount(model: Path) -> None:
    assert error_of(lambda: take(model)) == (
        f"{model} is not on a trimsfs mount: only models on a mount are shared in GPU memory"
    )


def test_a_mount_without_a_gpu_tier_and_one_that_lacks_the_device(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_leases, "on_mount", lambda _file: True)
    (model.parent / ".trims" / model.name).mkdir(parents=True)
    assert "its mount serves no copies on GPUs" in error_of(lambda: take(model))
    offering(model, TOLD, "another")
    assert f"serves copies on another, not on {UUID}" in error_of(lambda: take(model, "layers.*", "ipc"))


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOMEM, GpuFullError, f"{UUID} is full"),
        (errno.EACCES, GpuError, "Permission denied"),
        (errno.EPERM, GpuError, "Operation not permitted"),
        (errno.EIO, GpuError, "the log of the mount says why"),
        (errno.ENAMETOOLONG, GpuError, "the pattern is too long"),
        (errno.EMFILE, GpuError, "Too many open files"),
    ],
)
def test_a_lease_that_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[GpuError], message: str
) -> None:
    monkeypatch.setattr(os, "open", failing(number))
    with model.open("rb", buffering=0) as file:
        assert message in error_of(lambda: copy_leases.take(model, file, DEVICE, "net.*", "ipc"), kind)


@pytest.mark.parametrize(
    ("pattern", "memory", "name"),
    [
        (None, "vmm", UUID),
        (None, "ipc", f"{UUID}.ipc"),
        ("layers.0.*", "vmm", f"{UUID}@layers.0.*"),
        ("a/b%2F@[!x]?", "ipc", f"{UUID}.ipc@a%2Fb%252F@[!x]?"),
    ],
)
def test_the_name_of_a_control_file(model: Path, pattern: str | None, memory: str, name: str) -> None:
    offering(model, TOLD, name)
    lease = take(model, pattern, memory)
    try:
        assert lease.description().tensors == (("a", "int8", (2, 3), 256, 6, None),)
    finally:
        lease.close()
        lease.close()
    assert not lease.held


@pytest.mark.parametrize(
    "told",
    [
        *("", "{", "[]", "null"),
        {**TOLD, "nbytes": 261},
        {**TOLD, "size": 511},
        {**TOLD, "nbytes": -1, "tensors": []},
        tensor(shape=[2**40, 3], dtype="float32"),
        tensor(shape=[2, 2]),
        tensor(shape=[-2, -3]),
        tensor(shape=[-1], nbytes=-1),
        tensor(shape=[0], nbytes=0, offset=-256),
        tensor(shape=[0], nbytes=0, offset=4097),
        tensor(dtype="q8_0", offset=-1),
        {name: value for name, value in TOLD.items() if name != "generation"},
        {**TOLD, "memory": "ipc", "ipc_handle": "00"},
        {**TOLD, "tensors": [{"name": "a"}]},
    ],
)
def test_an_offer_that_makes_no_sense(model: Path, told: object) -> None:
    offering(model, told)
    lease = take(model)
    assert "invalid description" in error_of(lease.description)
    lease.close()


@pytest.mark.parametrize(
    "told",
    [
        tensor(dtype="q8_0", shape=[1, 32], nbytes=34),
        tensor(dtype="float4_e2m1fn", shape=[11]),
        tensor(shape=[0, 7], nbytes=0, offset=1024),
        tensor(shape=[], nbytes=1),
    ],
)
def test_an_offer_that_makes_sense(model: Path, told: object) -> None:
    offering(model, told)
    lease = take(model)
    assert len(lease.description().tensors) == 1
    lease.close()


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ESTALE, GpuLostError, "the mount has ended this lease: open the model again"),
        (errno.ENOTCONN, GpuLostError, "the mount is gone"),
        (errno.EIO, GpuError, "Input/output error"),
    ],
)
def test_a_lease_that_is_lost(
    model: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[GpuError], message: str
) -> None:
    offering(model, TOLD)
    lease = take(model)
    lease.check()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", failing(number))
        for function in (lease.check, lease.description):
            assert message in error_of(function, kind)
    lease.close()
    assert "forked" in error_of(lease.check, GpuLostError)
