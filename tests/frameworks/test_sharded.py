"""A sharded Llama as transformers saves it: `trimsfs.open` of its directory gives what transformers itself loads."""

import os
from pathlib import Path

import pytest

from tests.frameworks import PROGRAMS
from tests.support.frameworks import ROOT, python_of, report_of
from tests.support.model_files import BIAS, WEIGHT, gguf
from tests.support.mounts import mounted

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_sharded_llama_is_loaded_without_a_copy(tmp_path: Path) -> None:
    program: list[str | Path] = [python_of("others"), PROGRAMS / "sharded_llama.py"]
    store = tmp_path / "store"
    shards = report_of([*program, "build", store / "llama"], ENVIRONMENT)["shards"]
    assert len(shards) > 2
    with mounted(store, tmp_path) as mount:
        told = report_of([*program, "load", mount.path / "llama"], ENVIRONMENT)
    assert told["equal"]
    assert told["arrays"]
    assert set(told["first"]) < set(shards)
    assert len(told["first"]) == 1
    for way in ("load_state_dict", "from_pretrained"):
        assert told[way] == {"logits": told["native"]["logits"], "copied": []}, way


def test_mxnet_gets_the_tensors_of_all_shards(tmp_path: Path) -> None:
    for number, array in enumerate((WEIGHT, BIAS), start=1):
        (tmp_path / f"model-{number:05}-of-00002.gguf").write_bytes(gguf({f"part{number}": array}))
    code = """
import json, sys, trimsfs
print(json.dumps({name: array.asnumpy().tobytes().hex() for name, array in trimsfs.open(sys.argv[1]).mxnet().items()}))
"""
    told = report_of([python_of("mxnet"), "-c", code, tmp_path], ENVIRONMENT)
    assert told == {"part1": WEIGHT.data.hex(), "part2": BIAS.data.hex()}
