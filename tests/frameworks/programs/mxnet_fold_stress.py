"""Load Modules and infer, time and again, in two threads, while what they load is folded all the time.

Run under ``trimsfs run``. Reports how often, and how many outputs were wrong; shows where all threads are and ends when
nothing has come of it for long.
"""

import argparse
import faulthandler
import os
import threading
import time
from pathlib import Path

# Folding, not computing, is what this is about.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MXNET_SUBGRAPH_BACKEND", "NONE")  # fused operators would not write to the weights
import mxnet as mx
from common import report, run, seeded_array

from trimsfs.extras.mxnet import folding_thread

SHAPE = (1, 3, 32, 32)
HUNG_S = 60
MORE = 1e-4
"""By how much outputs may differ: those of the layouts that weights have at first and later do in the last digits."""


class Loader(threading.Thread):
    """Loads Modules until it is time to end."""

    def __init__(self, prefix: Path, end: float) -> None:
        super().__init__(daemon=True)
        self._prefix, self._end = str(prefix), end
        self.loaded = self.inferred = self.wrong = 0
        self.failed: Exception | None = None

    def run(self) -> None:
        batch = mx.io.DataBatch([mx.nd.array(seeded_array(SHAPE))])
        expected = None
        try:
            while time.monotonic() < self._end:
                module = mx.mod.Module.load(self._prefix, 0, label_names=None)
                module.bind([("data", SHAPE)], for_training=False)
                for _ in range(10):
                    module.forward(batch, is_train=False)
                    output = module.get_outputs()[0].asnumpy()
                    expected = output if expected is None else expected
                    self.wrong += bool(abs(output - expected).max() > MORE * abs(expected).max())
                    self.inferred += 1
                self.loaded += 1
                faulthandler.dump_traceback_later(HUNG_S, exit=True)  # anew, from now
        except Exception as error:
            self.failed = error


def main() -> None:
    """Load the network that mxnet_end.py builds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    folding_thread.FIRST_S = folding_thread.LAST_S = 0.002
    faulthandler.dump_traceback_later(HUNG_S, exit=True)
    loaders = [Loader(options.directory / "net", time.monotonic() + options.seconds) for _ in range(2)]
    for loader in loaders:
        loader.start()
    for loader in loaders:
        loader.join()
        if loader.failed is not None:
            raise loader.failed
    faulthandler.cancel_dump_traceback_later()
    derived = options.directory / f".trims/net-0000.params/derived-{os.geteuid()}-0"
    counts = {name: [getattr(loader, name) for loader in loaders] for name in ("loaded", "inferred", "wrong")}
    report({**counts, "folded": derived.exists()})


if __name__ == "__main__":
    run(main)
