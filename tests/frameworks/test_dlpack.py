"""Frameworks take tensors that are lent as those in a device's memory are. Here these lie in the memory of the host."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks import PROGRAMS
from tests.support.frameworks import ROOT, TIMEOUT_S, python_of
from trimsfs.formats import DTYPE_BITS

NARROWED = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
SUBBYTE = {name for name, bits in DTYPE_BITS.items() if bits < 8}
RECENT = {"float8_e8m0fnu"}
"""Types that not every version of PyTorch or JAX that is tried has."""
MXNET = {"uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"}


def interpreter(framework: str) -> str:
    if framework == "jax":
        return str(Path(os.environ.get("TEST_HEAVY", ROOT / ".venv-heavy")) / "bin/python")
    return python_of("mxnet" if framework == "mxnet" else "others")


@pytest.mark.parametrize("framework", ["torch", "mxnet", pytest.param("jax", marks=pytest.mark.slow)])
def test_what_is_taken_is_right_and_kept_for_as_long_as_it_is_used(framework: str) -> None:
    done = subprocess.run(
        [interpreter(framework), "-W", "ignore", PROGRAMS / "dlpack_take.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["frameworks"][framework]
    types = found.pop("types")
    assert found == {"kept": True, "shared": True, "freed": True, "exception": "must be real number"}
    assert types.pop("q4_0") == "uint8 [4]"
    for dtype in DTYPE_BITS.keys() - RECENT:
        if dtype in SUBBYTE or (framework == "mxnet" and dtype not in MXNET):
            assert types[dtype] == "TypeError"
        elif framework != "mxnet" or dtype != "bfloat16":  # which MXNet calls by another name
            name = NARROWED.get(dtype, dtype) if framework == "jax" else dtype
            assert types[dtype] == f"{name} [2, 2]"
