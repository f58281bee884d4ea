"""Engines give the same output from a mount of S3 as from local files, and share what docs/frameworks.md says.

`make test` runs a few with small models, `make test-all` all whose environments are here, `make engines` all in full.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.engines import ENGINE_ROWS, Engine
from tests.engines.matrix import Matrix, matrix
from tests.services.ceph import Ceph

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

DIVIDE = 6
QUICK = {"safetensors_files/load-file", "onnx_models/large-not-packed"}
"""What is read with O_DIRECT, tests/reliability compares; what transformers loads by a path, tests/frameworks do."""
MOST_COPIED = 0.35
"""Of a model, by an engine that shares it: libraries take memory of their own with their first use."""


@pytest.fixture(scope="module")
def models(ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """The models, small, and a mount of them."""
    with matrix(ceph, tmp_path_factory.mktemp("engines"), divide=DIVIDE, repeated=0) as found:
        yield found


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, id=engine.name, marks=() if engine.name in QUICK else pytest.mark.slow)
        for engine in ENGINE_ROWS
    ],
)
def test_an_engine_loads_by_path_what_it_loads_locally(models: Matrix, engine: Engine) -> None:
    if not engine.python.exists():
        pytest.skip(f"make engines makes {engine.environment}")
    row = models.row(engine)
    assert row.equal
    assert row.forked.equal
    if engine.name in QUICK:
        assert row.forked.how == "yes"
    if not engine.copies:
        assert row.mapped > row.size / 2 or row.copied < row.size * MOST_COPIED


def test_each_documented_engine_is_tried() -> None:
    text = (Path(__file__).parents[2] / "docs/frameworks.md").read_text()
    section = text.partition("## Engines")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| (.+?) \| [\d.]+ \|", section, re.MULTILINE)
    assert len(documented) > 20
    assert set(documented) <= {engine.title for engine in ENGINE_ROWS}
