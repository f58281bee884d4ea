"""An emulated CUDA driver, and a stand-in for a mount with a GPU tier that has models in its devices' memory."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import KernelDriver, environment
from tests.unit.formats import writers
from tests.unit.formats.writers import ARRAYS, Array

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
NAMES = "a/b%"
BLOCKS = bytes(range(18))


def others() -> bytes:
    """A safetensors file of types that NumPy lacks."""
    header = {
        "brain": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "small": {"dtype": "F4", "shape": [2, 2], "data_offsets": [4, 6]},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [6, 6]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\x80\x3f\0\x40\x12\x34"


def quantised() -> bytes:
    """A GGUF file with one block of quantised weights."""
    data = bytearray(writers.gguf({"q": Array("float32", (1, 32), BLOCKS + bytes(128 - len(BLOCKS)))}))
    at = data.index(struct.pack("<QQIQ", 32, 1, 0, 0)) + 16
    struct.pack_into("<I", data, at, 2)
    return bytes(data)


MODELS = {
    "others.safetensors": others(),
    "quantised.gguf": quantised(),
    "model.safetensors": writers.safetensors({**ARRAYS, f"{NAMES}c": Array("float16", (1, 2), b"abcd")}),
    "notes.txt": b"no model at all",
}
PREAMBLE = """
import gc, json, os, sys
import trimsfs
from trimsfs.client import GpuError, GpuFullError, GpuLostError
from trimsfs import cuda

def tell(value):
    print(json.dumps(value), flush=True)

def leases():
    return sum("/gpu/GPU-" in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))

path = sys.argv[1]
"""


@dataclass
class StandIn:
    """Models in the memory of emulated devices, and the processes that have and use them."""

    kernel: KernelDriver
    directory: Path
    process: "subprocess.Popen[str]"

    def environment(self) -> dict[str, str]:
        """Of a process that sees the devices."""
        return os.environ | environment(self.kernel)

    def replace(self) -> None:
        """Have tokens that were told be of no use any more."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "replaced\n"

    def start(
        self, code: str, name: str = "model.safetensors", *, python: str = sys.executable, **variables: str
    ) -> Any:
        """A program that uses the model ``path``, and tells things."""
        return subprocess.Popen(
            [python, "-W", "error", "-c", PREAMBLE + code, self.directory / name],
            cwd=ROOT,
            env=self.environment() | {"PYTHONPATH": str(ROOT)} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, code: str, name: str = "model.safetensors", *, python: str = sys.executable, **variables: str
    ) -> list[Any]:
        """What a program tells that ends well and silently."""
        with self.start(code, name, python=python, **variables) as process:
            try:
                told, errors = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
        assert (process.returncode, errors) == (0, ""), errors
        return [json.loads(line) for line in told.splitlines()]

    def mappings(self) -> int:
        """How often memory is mapped, other than by the one that has loaded it."""
        allocations = self.kernel.allocations()
        return sum(each.mappings + len(each.holders) for each in allocations) - self._own

    def __post_init__(self) -> None:
        self._own = 0
        self._own = self.mappings()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    scratch = tmp_path_factory.mktemp("gpu")
    directory = scratch / "models"
    directory.mkdir()
    for name, data in MODELS.items():
        (directory / name).write_bytes(data)
    with (
        KernelDriver(scratch, [256 << 20] * 2) as kernel,
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.standin", directory, scratch / "socket"],
            cwd=ROOT,
            env=os.environ | environment(kernel),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "serving\n"
            yield StandIn(kernel, directory, process)
        finally:
            process.kill()
