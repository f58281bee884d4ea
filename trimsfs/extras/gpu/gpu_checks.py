"""The checks of ``trimsfs doctor`` for copies on GPUs: the driver, the devices and their nodes."""

from importlib.metadata import version
from pathlib import Path

from trimsfs.cli.diagnosis.checks import Advice, Check, as_server, server_of
from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.cuda import CudaError, CudaUnavailableError
from trimsfs.options import GPU_OFF, MountOptions

DEVICES = Path("/dev")


def checks(options: MountOptions) -> list[tuple[str, Check]]:
    """The checks of a mount with these options."""
    if options.gpu == "off":
        return [("CUDA", lambda _: GPU_OFF)]
    return [("CUDA", _driver), ("GPUs", _gpus), ("/dev/nvidia*", _device_nodes)]


def _driver(_: MountOptions) -> str:
    try:
        cuda.load_driver()
        supported = cuda.call("cuDriverGetVersion")
    except CudaError as error:
        return _no_copies(error)
    return f"cuda-bindings {version('cuda-bindings')}, driver for CUDA {supported // 1000}.{supported % 1000 // 10}"


def _gpus(_: MountOptions) -> str:
    try:
        cuda.load_driver()
    except CudaUnavailableError:  # the check "CUDA" says why
        return "none is usable"
    try:
        devices = cuda.devices()
    except CudaError as error:
        return _no_copies(error)
    return ", ".join(f"{device.uuid} ({device.name}, {device.total >> 20} MiB)" for device in devices)


def _no_copies(error: CudaError) -> str:
    """Why there are no copies on GPUs. Raises Advice if this host has a GPU."""
    if _nodes():
        raise Advice(f"no copies of models on GPUs: {error}")
    return f"no copies of models on GPUs: {error}"


def _device_nodes(options: MountOptions) -> str:
    """Check that the server may open the device nodes of GPUs. CUDA may have created them in an earlier check."""
    nodes = _nodes()
    if not nodes:
        return "none"
    closed, who = as_server(options, '[ -r "$one" ] && [ -w "$one" ]', nodes), server_of(options)
    if closed:
        raise Advice(
            f"no copies of models on GPUs: {who} may not open {', '.join(closed)}: "
            "add it to the group of these devices" + (", or set --server-user" if options.server_user else "")
        )
    return f"{who} may open {', '.join(map(str, nodes))}"


def _nodes() -> list[Path]:
    """The device nodes that CUDA needs."""
    return [
        path
        for path in sorted(DEVICES.glob("nvidia*"))
        if path.name in {"nvidiactl", "nvidia-uvm"} or path.name.removeprefix("nvidia").isdecimal()
    ]
