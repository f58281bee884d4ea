"""The client library: opens model files in a user's process, and returns their tensors without a copy.

It imports no server code, and files need not be on a mount.

::

    model = trimsfs.open("/models/resnet50/model.safetensors")
    weights = model.torch()          # or numpy(), jax(), tensorflow(), mxnet(): tensors by name
    weights = model.to("cuda:0").torch()     # all processes share one copy in the GPU's memory

    model = trimsfs.open("/models/llama")    # a directory with one model, in one file or in shards
    module.load_state_dict(model.state_dict(), assign=True)
"""

from os import PathLike

__all__ = [
    "DeviceModel",
    "DeviceTensor",
    "Folded",
    "FormatError",
    "GpuError",
    "GpuFullError",
    "GpuLostError",
    "Model",
    "ShardedModel",
    "open",
]

TYPE_CHECKING = False  # type checkers treat it as true; importing it from typing would slow every start
if TYPE_CHECKING:
    from trimsfs.client.model import Model
    from trimsfs.client.sharded_model import ShardedModel
    from trimsfs.extras.folding.folding import Folded
    from trimsfs.extras.gpu.client import DeviceModel, DeviceTensor, GpuError, GpuFullError, GpuLostError
    from trimsfs.formats import FormatError
else:
    _HOMES = {
        "FormatError": "trimsfs.formats:FormatError",
        "Model": "trimsfs.client.model:Model",
        "ShardedModel": "trimsfs.client.sharded_model:ShardedModel",
    }

    def __getattr__(name: str) -> object:  # lazy: every program of `trimsfs run` imports this package first
        from trimsfs.plugins import load, plugins  # noqa: PLC0415

        home = _HOMES.get(name) or plugins("client").get(name)
        if home is None or name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return load(home)


def open(path: str | PathLike[str]) -> "Model | ShardedModel":  # noqa: A001 - trimsfs.open(), as zarr.open()
    """Open a model file, the index of a sharded model, or a directory of one model, on a mount or anywhere else.

    In a directory, safetensors files take precedence over other formats. Raises OSError, which is FileNotFoundError for
    a missing shard and for a directory without a model. Raises FormatError for a directory of several models and for an
    invalid index.

    The first call that needs a model's content reads its files. It raises FormatError for a file of unknown format.
    """
    from trimsfs.client.sharded_model import open_model  # noqa: PLC0415

    return open_model(path)
