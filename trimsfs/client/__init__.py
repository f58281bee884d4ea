"""The client library: in a user's process, model files become tensors without a copy.

It needs nothing of the server.

::

    model = trimsfs.open("/models/resnet50/model.safetensors")
    weights = model.torch()          # or numpy(), jax(), tensorflow(), mxnet(): a dictionary by name
    weights = model.to("cuda:0").torch()     # over one copy in the GPU's memory, shared by all processes

    model = trimsfs.open("/models/llama")    # a directory: its one model, of shards or not
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

TYPE_CHECKING = False  # type checkers take it as true; importing it would take time
if TYPE_CHECKING:
    from trimsfs.client.folding import Folded
    from trimsfs.client.gpu import DeviceModel, DeviceTensor, GpuError, GpuFullError, GpuLostError
    from trimsfs.client.model import Model
    from trimsfs.client.sharded_model import ShardedModel
    from trimsfs.formats import FormatError
else:
    _HOMES = {
        "Folded": "folding",
        "FormatError": "model",
        "Model": "model",
        "ShardedModel": "sharded_model",
    } | dict.fromkeys(("DeviceModel", "DeviceTensor", "GpuError", "GpuFullError", "GpuLostError"), "gpu")

    def __getattr__(name: str) -> object:  # every program of `trimsfs run` imports this first: it must cost nothing
        import importlib  # noqa: PLC0415

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"trimsfs.client.{_HOMES[name]}"), name)


def open(path: str | PathLike[str]) -> "Model | ShardedModel":  # noqa: A001 - trimsfs.open(), as zarr.open()
    """Open a model file, the index of a sharded model, or a directory of one model, on a mount or anywhere else.

    Of a directory, safetensors are preferred to other formats. Raises FileNotFoundError for a shard that is missing
    and for a directory without a model, FormatError for one of several models, and OSError.

    The client reads a model's files at the first call that needs their content. That call raises FormatError for a file
    of an unknown format.
    """
    from trimsfs.client.sharded_model import open_model  # noqa: PLC0415

    return open_model(path)
