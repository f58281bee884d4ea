"""Give loaded parameters to MXNet's Modules and executors in every way, and report what each makes of them.

Knows of no file system.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import all_kib, digest, mapped_kib, report, run, seeded_array

# OpenMP reads this once, when MXNet loads it. One thread makes outputs comparable.
os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx

SHAPE = (2, 3, 64, 64)
WEIGHT, BIG, TWIN = "fc1_weight", "fc2_weight", "fc3_weight"
"""Of the perceptron."""
PATIENCE_S = 30


def build(directory: Path) -> None:
    """Write checkpoints of networks for images, and of a perceptron: two of float32, and one of float16."""
    directory.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    for name, kind in (("images", "resnet18_v1"), ("small", "mobilenet0.25")):
        network = mx.gluon.model_zoo.vision.get_model(kind, classes=10)
        network.initialize(mx.init.Xavier())
        network.hybridize()
        network(_images()).wait_to_read()
        network.export(str(directory / name))
    for epoch in range(3):
        module = mx.mod.Module(_perceptron())
        module.bind([("data", (4, 300))], [("softmax_label", (4,))])
        module.init_params(mx.init.Xavier())
        if epoch < 2:
            module.save_checkpoint(str(directory / "perceptron"), epoch)
        else:
            arguments, _ = module.get_params()
            halves = {f"arg:{name}": array.astype("float16") for name, array in arguments.items()}
            mx.nd.save(str(directory / "perceptron-0002.params"), halves)


def _perceptron(classes: int = 10, hidden: int = 513) -> Any:
    symbol = mx.sym.Variable("data")
    for layer in (1, 2, 3):
        symbol = mx.sym.FullyConnected(symbol, num_hidden=hidden, name=f"fc{layer}")
        symbol = mx.sym.Activation(symbol, act_type="relu")
    symbol = mx.sym.FullyConnected(symbol, num_hidden=classes, name="fc4")
    return mx.sym.SoftmaxOutput(symbol, name="softmax")


def _images(count: int = 2) -> Any:
    return mx.nd.array(seeded_array((count, *SHAPE[1:])))


def _rows(count: int = 4) -> Any:
    return mx.nd.array(seeded_array((count, 300)))


def _digest(*arrays: Any) -> str:
    return digest([array.asnumpy().data for array in arrays])


def _of(arrays: Mapping[str, Any]) -> str:
    return _digest(*(arrays[name] for name in sorted(arrays)))


def _params(module: Any) -> list[str]:
    return [_of(arrays) for arrays in module.get_params()]


def _output(module: Any, data: Any) -> str:
    module.forward(mx.io.DataBatch([data], []), is_train=False)
    return _digest(*module.get_outputs())


def _bound(symbol: Any, data: Any, **settings: Any) -> Any:
    module = mx.mod.Module(symbol, label_names=None, **settings)
    module.bind([("data", data.shape)], for_training=False)
    return module


def _load(directory: Path, epoch: int = 0) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    symbol, arguments, auxiliary = mx.model.load_checkpoint(str(directory / "perceptron"), epoch)
    return symbol, arguments, auxiliary


def _perceptron_module(directory: Path, epoch: int = 0, **settings: Any) -> Any:
    symbol, arguments, auxiliary = _load(directory, epoch)
    module = _bound(_unlabelled(symbol), _rows(), **settings)
    module.set_params(arguments, auxiliary)
    return module


def _unlabelled(symbol: Any) -> Any:
    return symbol.get_internals()["fc4_output"]


def _executor(directory: Path, data: Any, grad_req: Any = "null") -> Any:
    return _unlabelled(_load(directory)[0]).simple_bind(mx.cpu(), grad_req=grad_req, data=data.shape)


def _run(executor: Any, data: Any) -> str:
    return _digest(*executor.forward(is_train=False, data=data))


# Ways that copy nothing, under `trimsfs run`.


def module_load(directory: Path) -> object:
    module = mx.mod.Module.load(str(directory / "images"), 0, label_names=None)
    module.bind([("data", SHAPE)], for_training=False)
    outputs = [_output(module, _images()) for _ in range(3)]
    return [*outputs, *_params(module)]


def module_set(directory: Path) -> object:
    symbol, arguments, auxiliary = mx.model.load_checkpoint(str(directory / "images"), 0)
    module = _bound(symbol, _images())
    module.set_params(arguments, auxiliary)
    outputs = [_output(module, _images()) for _ in range(3)]
    return [*outputs, *_params(module), _of(arguments), _of(auxiliary)]


def executor_copy(directory: Path) -> object:
    _, arguments, auxiliary = _load(directory)
    executor = _executor(directory, _rows())
    weight = executor.arg_dict[WEIGHT]  # stays the executor's
    executor.copy_params_from(arguments, auxiliary)
    return [_run(executor, _rows()), _digest(weight), _of(arguments)]


# What belongs to whom.


def writes_stay_where_they_are(directory: Path) -> object:
    _, arguments, auxiliary = _load(directory)
    module = _bound(_unlabelled(_perceptron()), _rows())
    module.set_params(arguments, auxiliary)
    executor = module._exec_group.execs[0]
    found = [_output(module, _rows())]
    arguments[WEIGHT][:] = 0
    found += [_output(module, _rows()), *_params(module), _of(executor.arg_dict), _of(mx.nd.load(_path(directory)))]
    module.get_params()[0][WEIGHT][3:5] = 7
    found += [_output(module, _rows()), _of(arguments), _of(executor.arg_dict)]
    executor.arg_dict[BIG][:] = 1
    return [*found, _output(module, _rows()), *_params(module), _of(arguments)]


def written_before(directory: Path) -> object:
    found = []
    for part in (slice(None), slice(0, 1), slice(256, 257), slice(512, 513)):
        symbol, arguments, auxiliary = _load(directory)
        arguments[WEIGHT][part] = 1  # done by MXNet when it comes to it
        arguments[BIG][part] *= 2
        module = _bound(_unlabelled(symbol), _rows())
        module.set_params(arguments, auxiliary)
        found += [_output(module, _rows()), *_params(module)]
    return found


def used_before(directory: Path) -> object:
    symbol, arguments, auxiliary = mx.model.load_checkpoint(str(directory / "images"), 0)
    first = symbol.bind(mx.cpu(), arguments | {"data": _images()}, grad_req="null", aux_states=auxiliary)
    network = mx.gluon.SymbolBlock(symbol, mx.sym.Variable("data"))
    for name, parameter in network.collect_params().items():
        parameter._load_init(arguments[name] if name in arguments else auxiliary[name], mx.cpu())
    found = [_run(first, _images()) for _ in range(2)] + [_digest(network(_images())) for _ in range(2)]
    module = _bound(symbol, _images())
    module.set_params({name: arguments[name] for name in arguments if name != "data"}, auxiliary)
    return [*found, _output(module, _images()), *_params(module), _run(first, _images())]


def forward_before(directory: Path) -> object:
    found: list[str] = []
    for name, data in (("images", _images()), ("perceptron", _rows())):
        symbol, arguments, auxiliary = mx.model.load_checkpoint(str(directory / name), 0)
        shapes = {"data": data.shape}
        executor = symbol.simple_bind(mx.cpu(), grad_req="null", **shapes)
        found += [_run(executor, data) for _ in range(2)]
        executor.copy_params_from(arguments, auxiliary, True)
        found += [_run(executor, data) for _ in range(2)]
        executor = symbol.simple_bind(mx.cpu(), grad_req="null", **shapes)
        for names, arrays in ((executor.arg_dict, arguments), (executor.aux_dict, auxiliary)):
            for parameter in names.keys() & arrays.keys():
                names[parameter][:] = arrays[parameter] * 0.5
        found += [_run(executor, data) for _ in range(2)]
        executor.copy_params_from({name: arguments[name] for name in arguments if name.endswith("weight")})
        found += [_run(executor, data) for _ in range(2)]
    return found


def _path(directory: Path, epoch: int = 0) -> str:
    return str(directory / f"perceptron-{epoch:04}.params")


def file_replaced(directory: Path) -> object:
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch, "link")
        link.symlink_to(_path(directory))
        loaded = mx.nd.load(str(link))
        module = _bound(_unlabelled(_perceptron()), _rows())
        link.unlink()
        link.symlink_to(_path(directory, 1))
        module.set_params({name.removeprefix("arg:"): array for name, array in loaded.items()}, {})
        first = _output(module, _rows())
        link.unlink()
        return [first, _output(module, _rows()), *_params(module)]


# Parameters again, others, some of them, too many, wrong ones.


def set_again(directory: Path) -> object:
    module = _perceptron_module(directory)
    kept, _ = module.get_params()
    found = [_output(module, _rows())]
    for epoch in (1, 0, 2):
        _, arguments, auxiliary = _load(directory, epoch)
        module.set_params(arguments, auxiliary)
        found += [_output(module, _rows()), _of(kept), *_params(module)]
    _, arguments, auxiliary = _load(directory, 1)
    module.set_params(arguments, auxiliary, force_init=False)
    return [*found, _output(module, _rows()), _of(kept)]


def swapped(directory: Path) -> object:
    _, arguments, auxiliary = _load(directory)
    found = []
    for others in ({BIG: TWIN, TWIN: BIG}, {BIG: TWIN}, {TWIN: BIG}):
        module = _bound(_unlabelled(_perceptron()), _rows())
        module.set_params(arguments | {name: arguments[other] for name, other in others.items()}, auxiliary)
        found += [_output(module, _rows()), *_params(module)]
        executor = _executor(directory, _rows())
        executor.copy_params_from({name: arguments[other] for name, other in others.items()})
        found.append(_of(executor.arg_dict))
    return found


def older_epoch(directory: Path) -> object:
    _, first, auxiliary = _load(directory, 0)
    _, second, _ = _load(directory, 1)
    module = _bound(_unlabelled(_perceptron()), _rows())
    module.set_params(first | {BIG: second[BIG]}, auxiliary)
    return [_output(module, _rows()), *_params(module), _of(first), _of(second)]


def forced(directory: Path) -> object:
    mx.random.seed(1)
    module = _bound(_unlabelled(_perceptron()), _rows())
    module.init_params(mx.init.Xavier())
    found = [_output(module, _rows())]
    _, arguments, auxiliary = _load(directory)
    module.init_params(arg_params=arguments, aux_params=auxiliary, force_init=False)
    found.append(_output(module, _rows()))
    module.init_params(arg_params=arguments, aux_params=auxiliary, force_init=True)
    found += [_output(module, _rows()), *_params(module)]
    module.init_params(mx.init.Constant(0.01), force_init=True)
    return [*found, _output(module, _rows()), *_params(module), _of(arguments)]


def some_missing(directory: Path) -> object:
    _, arguments, auxiliary = _load(directory)
    del arguments[BIG]
    module = _bound(_unlabelled(_perceptron()), _rows())
    found = [_outcome(lambda: module.set_params(arguments, auxiliary)), module.params_initialized]
    found.append({name: _digest(array) for name, array in module._arg_params.items()})
    module.set_params(arguments, auxiliary, allow_missing=True)
    found += [_output(module, _rows()), *_params(module)]
    module = _bound(_unlabelled(_perceptron()), _rows())
    module.init_params(mx.init.Constant(0.01), arguments, auxiliary, allow_missing=True)
    found += [_output(module, _rows()), *_params(module)]
    module = _bound(_unlabelled(_perceptron()), _rows())
    module.init_params(mx.init.Constant(0.01), arg_params=arguments, aux_params=auxiliary, allow_missing=True)
    return [*found, _output(module, _rows()), *_params(module)]


def some_extra(directory: Path) -> object:
    _, arguments, auxiliary = _load(directory)
    names = list(arguments)
    extended = {name: arguments[name] for name in names[:2]} | {"extra": arguments[BIG]} | arguments
    module = _bound(_unlabelled(_perceptron()), _rows())
    found = [_outcome(lambda: module.set_params(extended, auxiliary, allow_missing=True))]
    found += [_of(module._exec_group.execs[0].arg_dict), module.params_initialized]
    found.append(_outcome(lambda: module.set_params(extended, auxiliary)))
    found += [_output(module, _rows()), *_params(module)]
    module = _bound(_unlabelled(_perceptron()), _rows())
    module.set_params(extended, auxiliary, allow_missing=True, allow_extra=True)
    found += [_output(module, _rows()), *_params(module)]
    executor = _executor(directory, _rows())
    found.append(_outcome(lambda: executor.copy_params_from(extended)))
    found.append(_outcome(lambda: executor.copy_params_from(arguments, {"extra": arguments[BIG]})))
    found.append(_of(executor.arg_dict))
    executor.copy_params_from(extended, None, True)
    return [*found, _run(executor, _rows())]


def wrong_shapes(directory: Path) -> object:
    _, arguments, auxiliary = _load(directory)
    found: list[object] = []
    for classes, hidden in ((11, 513), (10, 512), (10, 514)):
        module = _bound(_unlabelled(_perceptron(classes, hidden)), _rows())
        found.append(_outcome(lambda: module.set_params(arguments, auxiliary)))  # noqa: B023
        found.append(_outcome(lambda: module.set_params(arguments, auxiliary, allow_missing=True)))  # noqa: B023
    executor = _executor(directory, _rows())
    found.append(_outcome(lambda: executor.copy_params_from({WEIGHT: arguments[BIG], BIG: arguments[BIG]})))
    return [*found, _of(executor.arg_dict)]


def casts(directory: Path) -> object:
    module = _perceptron_module(directory, 2)  # float16 for float32
    found: list[object] = [_output(module, _rows()), *_params(module)]
    _, arguments, auxiliary = _load(directory)
    for dtype in ("float64", "float16"):
        executor = _unlabelled(_perceptron()).simple_bind(mx.cpu(), "null", {"data": dtype}, data=(4, 300))
        executor.copy_params_from(arguments, auxiliary)
        found += [_outcome(lambda: _run(executor, _rows().astype(dtype))), _of(executor.arg_dict)]  # noqa: B023
        module = mx.mod.Module(_unlabelled(_perceptron()), label_names=None)
        module.bind([mx.io.DataDesc("data", (4, 300), dtype)], for_training=False)
        module.set_params(arguments, auxiliary)
        found += [_outcome(lambda: _output(module, _rows().astype(dtype))), *_params(module)]  # noqa: B023
    return found


def not_in_a_dict(directory: Path) -> object:
    from collections import OrderedDict, defaultdict

    _, arguments, auxiliary = _load(directory)
    found: list[object] = []
    for given in (
        OrderedDict(arguments),
        defaultdict(lambda: mx.nd.zeros(1), arguments),
        {name: array.asnumpy() for name, array in arguments.items()},
        list(arguments.items()),
        None,
    ):
        module = _bound(_unlabelled(_perceptron()), _rows())
        found.append(_outcome(lambda: module.set_params(given, auxiliary)))  # noqa: B023
        found.append(_outcome(lambda: [_output(module, _rows()), *_params(module)]))  # noqa: B023
    return found


# What is no inference in one place.


def training(directory: Path) -> object:
    found = []
    for fixed in ([], [WEIGHT]):
        module = mx.mod.Module.load(str(directory / "perceptron"), 0, fixed_param_names=fixed)
        module.bind([("data", (4, 300))], [("softmax_label", (4,))])
        module.init_optimizer(optimizer_params={"learning_rate": 0.5})
        batch = mx.io.DataBatch([_rows()], [mx.nd.array([1, 2, 3, 4])])
        for _ in range(2):
            module.forward_backward(batch)
            module.update()
            found.append(_digest(*module.get_outputs()))
        found += _params(module)
        module.bind([("data", (4, 300))], for_training=False, force_rebind=True)
        found += [_output(module, _rows()), *_params(module)]
        module.bind([("data", (4, 300))], [("softmax_label", (4,))], force_rebind=True)
        module.forward_backward(batch)
        module.update()
        found += _params(module)
    return [*found, _of(mx.nd.load(_path(directory)))]


def gradients(directory: Path) -> object:
    _, arguments, _ = _load(directory)
    found = []
    requests: tuple[Any, ...] = ("write", "add", ["null"] * 9, {WEIGHT: "write"}, {WEIGHT: "null"})
    for request in requests:
        executor = _executor(directory, _rows(), request)
        executor.copy_params_from(arguments)
        executor.forward(is_train=True, data=_rows())
        executor.backward([mx.nd.ones((4, 10))])
        found += [_of(executor.arg_dict), [_digest(array) for array in executor.grad_arrays if array is not None]]
    return found


def contexts(directory: Path) -> object:
    module = _perceptron_module(directory, context=[mx.cpu(0), mx.cpu(1)])
    found = [_output(module, _rows()), *_params(module)]
    with mx.Context(mx.cpu(1)):
        module = _perceptron_module(directory)
        found += [str(module.get_params()[0][BIG].context), _output(module, _rows()), *_params(module)]
    module = _perceptron_module(directory, context=mx.cpu(1))
    return [*found, _output(module, _rows()), *_params(module)]


def groups(directory: Path) -> object:
    module = _perceptron_module(directory, group2ctxs={"somewhere": mx.cpu(1)})
    return [_output(module, _rows()), *_params(module)]


def shared_module(directory: Path) -> object:
    first = _perceptron_module(directory)
    second = mx.mod.Module(_unlabelled(_perceptron()), label_names=None)
    second.bind([("data", (2, 300))], for_training=False, shared_module=first)
    found = [_output(second, _rows(2)), _output(first, _rows()), *_params(second)]
    _, arguments, auxiliary = _load(directory, 1)
    second.set_params(arguments, auxiliary)
    return [*found, _output(second, _rows(2)), _output(first, _rows()), *_params(first)]


def reshaped(directory: Path) -> object:
    module = _perceptron_module(directory)
    found = [_output(module, _rows(count)) for count in (4, 9, 2, 4)]
    module.reshape([("data", (3, 300))])
    found += [_output(module, _rows(3)), *_params(module)]
    _, arguments, auxiliary = _load(directory, 1)
    module.set_params(arguments, auxiliary)
    found += [_output(module, _rows(count)) for count in (3, 4)]
    first = _executor(directory, _rows())
    second = first.reshape(allow_up_sizing=True, data=(8, 300))
    second.copy_params_from(arguments)
    found += [_run(first, _rows()), _run(second, _rows(8))]
    first.copy_params_from(_load(directory)[1])
    return [*found, _run(first, _rows()), _run(second, _rows(8))]


def own_buffer(directory: Path) -> object:
    _, arguments, _ = _load(directory)
    symbol, found = _unlabelled(_perceptron()), []
    full = {WEIGHT: mx.nd.ones((513, 300)), "data": mx.nd.ones((10, 300))}
    for names, buffer in (([], full), ([BIG], dict(full)), ([BIG, WEIGHT], {}), ([], {"fc1_bias": mx.nd.ones(513)})):
        executor = symbol.simple_bind(
            mx.cpu(), "null", shared_arg_names=names, shared_buffer=buffer, type_dict={"data": "float32"}, data=(4, 300)
        )
        found.append([sorted(buffer), *(_of(arrays) for arrays in (buffer, executor.arg_dict))])
        executor.copy_params_from(arguments)
        found.append([_run(executor, _rows()), *(_of(arrays) for arrays in (buffer, executor.arg_dict))])
    return found


def same_name_twice(directory: Path) -> object:
    _, arguments, _ = _load(directory)
    symbol = mx.sym.Variable(BIG) + mx.sym.Variable(BIG)
    executor = symbol.simple_bind(mx.cpu(), "null", **{BIG: (513, 513)})
    executor.arg_arrays[0][:] = 1
    return [_digest(*executor.forward()), _outcome(lambda: executor.copy_params_from(arguments))]


def refused(directory: Path) -> object:
    _, arguments, _ = _load(directory)
    symbol, kept = _unlabelled(_perceptron()), arguments[BIG]
    attempts: tuple[Callable[[], object], ...] = (
        lambda: symbol.simple_bind(mx.cpu(), "null"),
        lambda: symbol.simple_bind(mx.cpu(), "null", data=(4, 300), fc2_weight=(1, 2)),
        lambda: symbol.simple_bind(mx.cpu(), "null", shared_buffer=[kept], data=(4, 300)),
        lambda: symbol.simple_bind(mx.cpu(), "null", shared_arg_names=(WEIGHT,), data=(4, 300)),
        lambda: symbol.simple_bind(mx.cpu(), [], data=(4, 300)),
        lambda: symbol.simple_bind(mx.cpu(), "never", data=(4, 300)),
        lambda: symbol.simple_bind(data=(4, 300)),
        lambda: _run(symbol.simple_bind(mx.cpu(), None, data=(4, 300)), _rows()),
        lambda: _run(symbol.simple_bind(ctx=mx.cpu(), grad_req="null", none=3, data=(4, 300)), _rows()),
    )
    return [_outcome(attempt) for attempt in attempts]


WAYS: tuple[Callable[[Path], object], ...] = (
    *(module_load, module_set, executor_copy),
    *(writes_stay_where_they_are, written_before, used_before, forward_before, file_replaced),
    *(set_again, swapped, older_epoch, forced, some_missing, some_extra, wrong_shapes, casts, not_in_a_dict),
    *(training, gradients, contexts, groups, shared_module, reshaped, own_buffer, same_name_twice, refused),
)


# What is had in memory.


def _private() -> int:
    """Bytes that only this process has, and has written."""
    return all_kib("Private_Dirty") << 10


def _rewritten(directory: Path) -> int:
    """Bytes that this process has written in mappings of files below a directory."""
    return mapped_kib(directory, "Anonymous")["Anonymous"] << 10


def _settled(directory: Path) -> dict[str, int]:
    """What had been rewritten, and what of that this process still has alone when that gets no less."""
    before, deadline = _rewritten(directory), time.monotonic() + PATIENCE_S
    while _rewritten(directory) > before // 10 and time.monotonic() < deadline:
        time.sleep(0.2)
    return {"rewritten": before, "left": _rewritten(directory)}


def _loaded(directory: Path, name: str, shape: tuple[int, ...], way: str) -> Callable[[], str]:
    """A model, as a function that computes with it once."""
    data = mx.nd.ones(shape)
    if way == "load":
        module = mx.mod.Module.load(str(directory / name), 0, label_names=None)
        module.bind([("data", shape)], for_training=False)
        return lambda: _output(module, data)
    symbol, arguments, auxiliary = mx.model.load_checkpoint(str(directory / name), 0)
    if way == "set":
        module = _bound(symbol, data)
        module.set_params(arguments, auxiliary)
        return lambda: _output(module, data) * bool(arguments)  # which this keeps
    executor = symbol.simple_bind(mx.cpu(), grad_req="null", data=shape)
    executor.copy_params_from(arguments, auxiliary)
    return lambda: _run(executor, data) * bool(arguments)


def memory(directory: Path, way: str) -> dict[str, object]:
    """What a network takes of memory: when it is loaded, and when it has been computed with for some time."""
    _loaded(directory, "small", SHAPE, way)()
    before = _private()
    compute = _loaded(directory, "images", SHAPE, way)
    mx.nd.waitall()
    size = (directory / "images-0000.params").stat().st_size
    return {
        "private": (_private() - before) / size,
        "outputs": [compute() for _ in range(5)],
        **_settled(directory),
        "afterwards": [compute() for _ in range(5)],
    }


def folded_before(directory: Path) -> dict[str, object]:
    """Set parameters that have been changed, and may be elsewhere in memory since."""
    symbol, arguments, auxiliary = mx.model.load_checkpoint(str(directory / "images"), 0)
    for array in arguments.values():
        array[:] = array * 2
    mx.nd.waitall()
    settled = _settled(directory)
    module = _bound(symbol, _images())
    module.set_params(arguments, auxiliary)
    return {**settled, "outputs": [_output(module, _images()), *_params(module)]}


def _outcome(way: Callable[[], object]) -> object:
    """What it gives, or the error that it raises."""
    try:
        return way()
    except Exception as error:
        text = str(error).splitlines()
        return [type(error).__name__, text[-1] if text else ""]


def main() -> None:
    """Build, load in every way, or tell of memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--memory", choices=("load", "set", "executor"))
    parser.add_argument("--folded-before", action="store_true")
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    if options.build:
        build(options.directory)
        report({})
    elif options.memory:
        report(memory(options.directory, options.memory))
    elif options.folded_before:
        report(folded_before(options.directory))
    else:
        report({way.__name__: _outcome(lambda: way(options.directory)) for way in WAYS})  # noqa: B023


if __name__ == "__main__":
    run(main)
