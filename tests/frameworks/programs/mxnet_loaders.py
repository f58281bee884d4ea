"""Load one network through each of MXNet's loaders, and report what each makes of it. Knows of no file system."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import digest, report, run, seeded_array

# OpenMP reads this once, when MXNet loads it. One thread makes outputs comparable.
os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx

NETWORK = "resnet18_v1"


def build(directory: Path) -> None:
    """Write the network as a checkpoint, and as Gluon's parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    network = mx.gluon.model_zoo.vision.get_model(NETWORK, classes=10)
    network.initialize(mx.init.Xavier())
    network.hybridize()
    network(_image()).wait_to_read()
    network.export(str(directory / "model"))
    network.save_parameters(str(directory / "gluon.params"))
    mx.nd.save(str(directory / "list"), [mx.nd.arange(10), mx.nd.ones((2, 3), dtype="float16")])


def _image() -> Any:
    return mx.nd.array(seeded_array((1, 3, 64, 64)))


def _digest(*arrays: Any) -> str:
    return digest([array.asnumpy().data for array in arrays])


def _network() -> Any:
    return mx.gluon.model_zoo.vision.get_model(NETWORK, classes=10)


def _nd_load(directory: Path) -> object:
    arrays = mx.nd.load(str(directory / "model-0000.params"))
    first = next(iter(arrays.values()))
    first[:] = 1
    again = mx.nd.load(str(directory / "model-0000.params"))
    return [type(arrays).__name__, type(first).__name__, list(arrays), _digest(*again.values())]


def _nd_load_list(directory: Path) -> object:
    arrays = mx.nd.load(str(directory / "list"))
    return [type(arrays).__name__, _digest(*arrays), [str(array.dtype) for array in arrays]]


def _symbol_block(directory: Path) -> object:
    network = mx.gluon.SymbolBlock.imports(
        str(directory / "model-symbol.json"), ["data"], str(directory / "model-0000.params")
    )
    return [_digest(network(_image())) for _ in range(3)]


def _gluon(directory: Path) -> object:
    network = _network()
    network.load_parameters(str(directory / "gluon.params"))
    network.hybridize()
    return [_digest(network(_image())) for _ in range(3)]


def _gluon_contexts(directory: Path) -> object:
    network = _network()
    network.load_parameters(str(directory / "gluon.params"), ctx=[mx.cpu(0), mx.cpu(1)])
    parameters = network.collect_params().values()
    for parameter in parameters:
        parameter.data(mx.cpu(0))[:] = 0
    return [
        [str(context) for context in next(iter(parameters)).list_ctx()],
        _digest(*[p.data(mx.cpu(1)) for p in parameters]),
    ]


def _gluon_cast(directory: Path) -> object:
    network = _network()
    network.cast("float64")
    network.load_parameters(str(directory / "gluon.params"), cast_dtype=True)
    return _digest(network(_image().astype("float64")))


def _gluon_initialised(directory: Path) -> object:
    network = _network()
    network.initialize()
    network(_image())
    network.load_parameters(str(directory / "gluon.params"))
    return _digest(network(_image()))


def _gluon_trained(directory: Path) -> object:
    network = _network()
    network.load_parameters(str(directory / "gluon.params"))
    trainer = mx.gluon.Trainer(network.collect_params(), "sgd", {"learning_rate": 0.1})
    losses = []
    for _ in range(2):
        with mx.autograd.record():
            loss = (network(_image()) ** 2).sum()
        loss.backward()
        trainer.step(1)
        losses.append(float(loss.asscalar()))
    untouched = mx.nd.load(str(directory / "gluon.params"))
    return [losses, _digest(*untouched.values())]


def _gluon_forked(directory: Path) -> object:
    network = _network()
    network.load_parameters(str(directory / "gluon.params"))
    arrays = [array for parameter in network.collect_params().values() for array in (parameter.data(), parameter._grad)]
    arrays = [array[0] if isinstance(array, list) else array for array in arrays if array is not None]
    child = os.fork()
    if child == 0:
        for array in arrays:
            array[:] = 1
        mx.nd.waitall()
        os._exit(0)
    return [os.waitpid(child, 0)[1], len(arrays), _digest(*arrays)]


def _missing_parameter(directory: Path) -> object:
    network = mx.gluon.model_zoo.vision.get_model("resnet34_v1", classes=10)
    return network.load_parameters(str(directory / "gluon.params"))


def _extra_parameter(directory: Path) -> object:
    return mx.gluon.nn.Dense(3).load_parameters(str(directory / "gluon.params"), allow_missing=True)


def _wrong_shape(directory: Path) -> object:
    network = mx.gluon.model_zoo.vision.get_model(NETWORK, classes=11)
    return network.load_parameters(str(directory / "gluon.params"))


def _no_file(directory: Path) -> object:
    return mx.nd.load(str(directory / "absent.params"))


def _no_parameters(directory: Path) -> object:
    return mx.nd.load(str(directory / "model-symbol.json"))


LOADERS: tuple[Callable[[Path], object], ...] = (
    *(_nd_load, _nd_load_list, _symbol_block, _gluon, _gluon_contexts, _gluon_cast),
    *(_gluon_initialised, _gluon_trained, _gluon_forked),
    *(_missing_parameter, _extra_parameter, _wrong_shape, _no_file, _no_parameters),
)


def _outcome(loader: Callable[[Path], object], directory: Path) -> object:
    """What a loader gives, or the error that it raises, without where that lies."""
    try:
        return loader(directory)
    except Exception as error:
        text = str(error).replace(str(directory), "").splitlines()
        return [type(error).__name__, text[-1] if text else ""]


def main() -> None:
    """Build, or load in every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    if options.build:
        build(options.directory)
        report({})
        return
    results = {loader.__name__: _outcome(loader, options.directory) for loader in LOADERS}
    start = time.perf_counter()
    kept = mx.nd.load(str(options.directory / "model-0000.params"))
    mx.nd.waitall()
    load_s = time.perf_counter() - start
    mapped = f"{options.directory / 'model-0000.params'}\n" in Path("/proc/self/maps").read_text()
    report({"results": results, "mapped": mapped, "load_s": load_s, "kept": len(kept)})


if __name__ == "__main__":
    run(main)
