"""What only a real card shows: frameworks compute with the copies of a mount as with copies of their own.

``pytest -m gpu tests/gpu/test_card.py``, as root, where the driver sees a GPU. Programs are run by this interpreter, or
by that of the environment TEST_GPU: libraries that it lacks are skipped.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.mount import ROOT, GpuMount
from tests.support import model_files
from tests.support.model_files import Array
from tests.support.mounts import mounted, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

PYTHON = str(Path(os.environ["TEST_GPU"]) / "bin/python") if "TEST_GPU" in os.environ else sys.executable
NAME = "model.safetensors"
SIDE = 2048
USABLE = {
    "trimsfs": "from trimsfs.extras.gpu import cuda; cuda.devices()",
    "torch": "import torch; torch.zeros(1).cuda()",
    "cupy": "import cupy; cupy.zeros(1)",
    "numba": "import numba.cuda; numba.cuda.device_array(1)",
    "jax": "import jax; assert jax.devices('cuda')",
}


HERE = """
import numpy as np
model = trimsfs.open(path)
here = {
    each.name: np.frombuffer(model.raw(each), each.dtype).reshape(each.shape)
    for each in model.table.tensors
    if each.name in {"matrix", "numbers"}
}
"""


def written() -> bytes:
    """A safetensors file: a matrix, two types that NumPy lacks, integers, and a tensor without elements."""
    small = bytes(range(0, 112, 4))
    matrix = np.random.default_rng(1).standard_normal((SIDE, SIDE), dtype=np.float32).tobytes()
    return model_files.safetensors(
        {
            "matrix": Array("float32", (SIDE, SIDE), matrix),
            "brain": Array("bfloat16", (14,), small),
            "eighth": Array("float8_e4m3fn", (28,), small),
            "numbers": Array("int64", (2,), bytes(16)),
            "empty": Array("float32", (0, 3), b""),
        }
    )


def needs(library: str) -> None:
    """Skip where a library is not installed, or cannot use a GPU."""
    done = subprocess.run(
        [PYTHON, "-c", USABLE[library]], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"{library} cannot use a GPU in {PYTHON}: {(done.stderr.splitlines() or ['?'])[-1]}")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuMount]:
    needs("trimsfs")
    scratch = tmp_path_factory.mktemp("card")
    store = scratch / "store"
    store.mkdir()
    (store / NAME).write_bytes(written())
    with mounted(store, scratch) as mount:
        yield GpuMount(None, mount)


def run(card: GpuMount, code: str) -> list[object]:
    """What a program tells, and that nothing of it is left."""
    told = card.run(code, NAME, python=PYTHON)
    wait_until(lambda: card.leases() == 0)
    return told


@pytest.mark.parametrize("memory", ["vmm", "ipc"])
def test_what_is_on_the_card_is_what_the_file_has(card: GpuMount, memory: str) -> None:
    code = f"""
model = trimsfs.open(path)
there = model.to("cuda", memory={memory!r})
for tensor in model.table.tensors:
    if tensor.nbytes:
        assert there.tensors[tensor.name].raw().numpy().tobytes() == bytes(model.raw(tensor)), tensor
tell(sorted(there.tensors))
"""
    assert run(card, code) == [["brain", "eighth", "empty", "matrix", "numbers"]]


@pytest.mark.parametrize("memory", ["vmm", "ipc"])
def test_pytorch_computes_with_it(card: GpuMount, memory: str) -> None:
    needs("torch")
    code = f"""
import torch
there, here = trimsfs.open(path).to("cuda", memory={memory!r}).torch(), trimsfs.open(path).torch()
for name, tensor in here.items():
    assert there[name].is_cuda
    assert (there[name].dtype, there[name].shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(there[name].reshape(-1).view(torch.uint8).cpu(), tensor.reshape(-1).view(torch.uint8))
matrix, own = there["matrix"], here["matrix"].cuda()
assert matrix.data_ptr() != own.data_ptr()
del there, here
gc.collect()
batch = torch.ones(8, {SIDE}, device="cuda")
for _ in range(10):
    assert torch.equal(batch @ matrix, batch @ own)
pending = batch @ matrix
del matrix
assert torch.equal(pending, batch @ own)
tell(leases())
"""
    assert run(card, code) == [0]


def test_cupy_computes_with_it(card: GpuMount) -> None:
    needs("cupy")
    code = f"""
import cupy
there = model.to("cuda", "[mn]*").cupy()
for name, array in there.items():
    assert array.dtype == here[name].dtype
    assert (cupy.asnumpy(array) == here[name]).all()
own, batch = cupy.asarray(here["matrix"]), cupy.ones((8, {SIDE}), "float32")
assert (batch @ there["matrix"] == batch @ own).all()
tell(sorted(there))
"""
    assert run(card, HERE + code) == [["matrix", "numbers"]]


@pytest.mark.parametrize("library", ["numba", "jax"])
def test_others_have_it(card: GpuMount, library: str) -> None:
    needs(library)
    code = f"""
array = model.to("cuda", "matrix").{library}()["matrix"]
found = array.copy_to_host() if {library!r} == "numba" else np.asarray(array)
tell(bool((found == here["matrix"]).all()))
"""
    assert run(card, HERE + code) == [True]


def test_a_write_faults_or_is_seen_by_all(card: GpuMount) -> None:
    code = """
model = trimsfs.open(path).to("cuda", "numbers", memory=MEMORY)
with cuda.Context(model.ordinal):
    try:
        cuda.call("cuMemsetD8", model.tensors["numbers"].address, 1, 8)
        cuda.synchronize()
        tell("written")
    except cuda.CudaError as error:
        tell("refused")
os._exit(0)  # after such a fault nothing of CUDA works in this process
"""
    look = "tell(trimsfs.open(path).to('cuda', 'numbers', memory='vmm').numpy()['numbers'].tolist())"
    assert run(card, f"MEMORY = 'vmm'{code}") == ["refused"]
    assert run(card, look) == [[0, 0]]
    assert run(card, f"MEMORY = 'ipc'{code}") == ["written"]


def test_programs_share_one_copy_and_keep_it_when_the_server_dies(card: GpuMount) -> None:
    code = """
before = trimsfs.open(path).to("cuda", "matrix")
first = before.tensors["matrix"].raw().numpy().tobytes()
tell("ready")
input()
before.check()
tell(before.tensors["matrix"].raw().numpy().tobytes() == first)
input()
"""
    programs = [card.start(code, NAME, python=PYTHON) for _ in range(2)]
    try:
        for program in programs:
            assert program.stdout is not None
            assert program.stdout.readline() == '"ready"\n'
        told = json.loads((card.mount.path / ".trims/gpu").read_text())
        copies = [copy for device in told["devices"] for copy in device["copies"] if copy["leased"]]
        assert [copy["leased"] for copy in copies] == [2]
        card.kill_server()
        for program in programs:
            print(file=program.stdin, flush=True)
            assert program.stdout is not None
            assert program.stdout.readline() == "true\n"
    finally:
        for program in programs:
            program.kill()
            program.communicate()
    wait_until(lambda: card.leases() == 0)
