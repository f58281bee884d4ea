"""A mount whose server lends copies of models on emulated devices, and programs that use them."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mountctl.keeper.control_socket import ask
from tests.cuda import KernelDriver, environment
from tests.support import model_files
from tests.support.model_files import ARRAYS, BIAS, HALF, WEIGHT, Array
from tests.support.mounts import MountedStore, wait_until
from trimsfs.extras.gpu.client import GpuError

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
NAMES = "a/b%"
BLOCKS = bytes(range(18))


def quantised() -> bytes:
    """A GGUF file with one block of quantised weights."""
    data = bytearray(model_files.gguf({"q": Array("float32", (1, 32), BLOCKS + bytes(128 - len(BLOCKS)))}))
    at = data.index(struct.pack("<QQIQ", 32, 1, 0, 0)) + 16
    struct.pack_into("<I", data, at, 2)
    return bytes(data)


MODELS = {
    "others.safetensors": model_files.safetensors(
        {
            "brain": Array("bfloat16", (2,), b"\x80\x3f\0\x40"),
            "small": Array("float4_e2m1fn", (2, 2), b"\x12\x34"),
            "empty": Array("float32", (0, 3), b""),
        }
    ),
    "quantised.gguf": quantised(),
    "model.safetensors": model_files.safetensors({**ARRAYS, f"{NAMES}c": Array("float16", (1, 2), b"abcd")}),
    "notes.txt": b"no model at all",
    "sharded/model-00001-of-00002.safetensors": model_files.safetensors({"half": HALF, "net.bias": BIAS}),
    "sharded/model-00002-of-00002.safetensors": model_files.safetensors({"net.weight": WEIGHT}),
}


PREAMBLE = """
import gc, json, os, sys
import trimsfs
from trimsfs.client import GpuError, GpuFullError, GpuLostError
from trimsfs.extras.gpu import cuda

def tell(value):
    print(json.dumps(value), flush=True)

def leases():
    return sum("/gpu/GPU-" in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))

path = sys.argv[1]
"""


@dataclass(frozen=True, slots=True)
class GpuMount:
    """A mount of models, what programs there do, and the emulated devices, if these are emulated."""

    kernel: KernelDriver | None
    mount: MountedStore

    def start(
        self, code: str, name: str = "model.safetensors", *, python: str = sys.executable, **variables: str
    ) -> "subprocess.Popen[str]":
        """A program that uses the model ``path``, and tells things."""
        devices = environment(self.kernel) if self.kernel else {}
        return subprocess.Popen(
            [python, "-W", "error", "-c", PREAMBLE + code, self.mount.path / name],
            cwd=ROOT,
            env=os.environ | devices | {"PYTHONPATH": str(ROOT)} | variables,
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
        assert not self.uses(process)
        return [json.loads(line) for line in told.splitlines()]

    def uses(self, process: "subprocess.Popen[str]") -> bool:
        """Whether a program has memory of an emulated device mapped."""
        if self.kernel is None:
            return False
        return any(process.pid in allocation.holders for allocation in self.kernel.allocations())

    def uuid(self, number: int) -> str:
        """Of an emulated device."""
        assert self.kernel is not None
        return self.kernel.devices[number].uuid

    def leases(self) -> int:
        """How many the server knows of."""
        told = json.loads((self.mount.path / ".trims/gpu").read_text())
        return sum(copy["leased"] for device in told["devices"] for copy in device["copies"])

    def kill_server(self) -> None:
        """Kill the server, and wait for the next."""
        server = self._server()
        assert server is not None
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: self._server() not in {None, server}, timeout_s=30)

    def _server(self) -> int | None:
        facts = ask(self.mount.path, {"do": "status"}, timeout_s=5)
        pid = facts["server_pid"]
        return pid if facts["state"] == "serving" and facts["standby"] and isinstance(pid, int) else None


def error_of(function: Callable[[], object], kind: type[GpuError] = GpuError) -> str:
    with pytest.raises(GpuError) as caught:
        function()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    return text
