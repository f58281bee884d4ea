"""What a program may do while it is folded: fail, run operators in Python, train, clean up in finalizers.

Run under ``trimsfs run``; looks at the mappings all the time. Reports what came of it.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Folding, not computing, is what this is about.
os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx
from common import report, run

from trimsfs.extras.mxnet import folding_thread

SHAPE = (2, 3, 8, 8)
SECONDS = 4.0


def build(directory: Path) -> None:
    """Save a network with some megabytes of weights."""
    network = mx.gluon.nn.HybridSequential()
    network.add(mx.gluon.nn.Conv2D(64, 3, in_channels=3), mx.gluon.nn.GlobalAvgPool2D(), mx.gluon.nn.Flatten())
    network.add(mx.gluon.nn.Dense(2048, in_units=64), mx.gluon.nn.Dense(2048, in_units=2048))
    network.initialize(mx.init.Xavier())
    network.hybridize()
    network(mx.nd.ones(SHAPE)).wait_to_read()
    network.export(str(directory / "net"))


class Twice(mx.operator.CustomOp):  # type: ignore[misc]
    """An operator in Python that computes with MXNet."""

    def forward(self, is_train: bool, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        self.assign(out_data[0], req[0], in_data[0] * 2)

    def backward(self, *_arguments: Any) -> None:
        raise NotImplementedError


@mx.operator.register("twice")
class TwiceProp(mx.operator.CustomOpProp):  # type: ignore[misc]
    """What there is to know of it."""

    def create_operator(self, *_arguments: Any) -> Twice:
        return Twice()


class Pooled:
    """Uses MXNet when the garbage collector finds it, in whatever thread that is."""

    def __init__(self) -> None:
        self.cycle, self.buffer = self, mx.nd.ones((4,))

    def __del__(self) -> None:
        self.buffer[:] = 0


def during(step: Callable[[], None]) -> tuple[int, float]:
    """Do something for some seconds; how often, and the longest that it took."""
    count, longest, end = 0, 0.0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        began = time.monotonic()
        step()
        count, longest = count + 1, max(longest, time.monotonic() - began)
    return count, longest


def main() -> None:
    """Save the network, or do all of that with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    if options.build:
        build(options.directory)
        return
    folding_thread.FIRST_S = folding_thread.LAST_S = 0.05
    symbol, params = (str(options.directory / name) for name in ("net-symbol.json", "net-0000.params"))
    network = mx.gluon.SymbolBlock.imports(symbol, ["data"], params)
    image, derived = mx.nd.ones(SHAPE), options.directory / f".trims/net-0000.params/derived-{os.geteuid()}-0"
    told: dict[str, object] = {}

    trainer = mx.gluon.Trainer(network.collect_params(), "sgd", {"learning_rate": 1e-3})

    def train() -> None:
        with mx.autograd.record():
            loss = (network(image) ** 2).mean()
        loss.backward()
        trainer.step(1)
        mx.nd.waitall()

    told["trained"], _ = during(train)
    told["passed on in training"] = derived.exists()
    network(image).wait_to_read()
    deadline = time.monotonic() + 20
    while not derived.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    told["passed on after it"] = derived.exists()

    def rewrite() -> None:
        for parameter in network.collect_params().values():
            parameter.data()[:] = parameter.data() + 0

    failures = [0, 0]

    def fail() -> None:
        failing = mx.nd.random.normal(0, -1, (2, 2))
        rewrite()
        try:
            failing.asnumpy()
        except mx.base.MXNetError:
            failures[0] += 1
        else:
            failures[1] += 1

    during(fail)
    rewrite()  # what layout the weights have makes a difference in the last digits
    expected = network(image).asnumpy()
    told["failures told and not told"] = failures

    wrong = [0]

    def custom() -> None:
        rewrite()
        # Bytes, for MXNet itself lets weights that are rewritten in place grow now and then, up to what is no number.
        wrong[0] += mx.nd.Custom(network(image), op_type="twice").asnumpy().tobytes() != (2 * expected).tobytes()

    told["operators in Python"], told["longest_s"] = during(custom)
    gc.set_threshold(200)

    def collected() -> None:
        Pooled()
        rewrite()
        wrong[0] += network(image).asnumpy().tobytes() != expected.tobytes()

    told["with finalizers"], told["longest with finalizers_s"] = during(collected)
    told["wrong"] = wrong[0]
    report(told)


if __name__ == "__main__":
    run(main)
