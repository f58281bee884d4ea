"""Libraries that have pools of threads work in forks of a process in which they have computed already."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fork_servers import ForkServers, fork_servers
from tests.support.frameworks import python_of

MODELS = {
    "torch": "import torch\nweights = torch.arange(640.0 * 640).reshape(640, 640).sin()\n"
    "def infer(): return (weights @ weights).numpy().tobytes()\n",
    "mxnet": "import mxnet as mx\nweights = mx.nd.arange(640 * 640).reshape((640, 640)).sin()\n"
    "def infer(): return mx.nd.dot(weights, weights).asnumpy().tobytes()\n",
    "numpy": "import numpy\nweights = numpy.sin(numpy.arange(640.0 * 640)).reshape(640, 640)\n"
    "def infer(): return (weights @ weights).tobytes()\n",
}
"""Each computes once when it is imported, as a model does that is warmed up."""
PROGRAM = (
    "import sys, zlib\nassert ('model' in sys.modules) == (sys.argv[1] == 'forked')\nimport model\n"
    "print(zlib.crc32(model.infer()), zlib.crc32(model.infer()))\n"
)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[ForkServers]:
    """Fork servers of this test alone."""
    with fork_servers(tmp_path / "spawn") as started:
        yield started


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("library", MODELS)
def test_a_model_that_has_computed_computes_the_same_in_forks(
    servers: ForkServers, tmp_path: Path, library: str, threads: str
) -> None:
    (tmp_path / "model.py").write_text(MODELS[library] + "infer()\n")
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    python = python_of("mxnet" if library == "mxnet" else "frameworks")
    more = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    options = ("--preload", "model")
    plain = servers.plain(python, script, "plain", environment=more)
    for _ in range(3):
        forked = servers.run(python, "-W", "ignore", script, "forked", options=options, environment=more)
        assert (forked.stdout, forked.stderr) == (plain, "")
