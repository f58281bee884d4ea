"""Write model files of every format by the libraries that define them, and report what is in them."""

import argparse
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import onnx
import safetensors.torch
import torch
from common import report, run, seeded_array

SHAPES: Mapping[str, tuple[int, ...]] = {"layer.weight": (8, 3, 5), "layer.bias": (7,), "scale": (), "none": (0, 4)}
NUMPY = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
NUMPY_FLOATS = ("float16", "float32", "float64", "complex64", "complex128")
TORCH = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
TORCH_NEW = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
QUANTISED = ("Q4_0", "Q8_0", "Q5_1")

Facts = dict[str, list[Any]]
"""By tensor: dtype, shape and CRC of the bytes."""


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of every type that NumPy has, and of every shape."""
    found = {name: seeded_array(shape) for name, shape in SHAPES.items()}
    for dtype in (*NUMPY, *NUMPY_FLOATS):
        found[f"as.{dtype}"] = (seeded_array((4, 6)) * 10).astype(dtype)
    return {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in found.items()}


def facts_of(tensors: Mapping[str, np.ndarray[Any, Any]]) -> Facts:
    """What a table is to tell of arrays."""
    return {name: [str(array.dtype), list(array.shape), zlib.crc32(array.tobytes())] for name, array in tensors.items()}


def torch_tensors() -> dict[str, torch.Tensor]:
    """Tensors of every type that PyTorch has, and of every shape."""
    found = {name: torch.from_numpy(seeded_array(shape).copy()) for name, shape in SHAPES.items()}
    for dtype in (*TORCH, *TORCH_NEW):
        found[f"as.{dtype}"] = (torch.from_numpy(seeded_array((4, 6))) * 10).abs().to(getattr(torch, dtype))
    return found


def torch_facts(tensors: Mapping[str, torch.Tensor]) -> Facts:
    """What a table is to tell of tensors."""
    return {
        name: [
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()),
        ]
        for name, tensor in tensors.items()
    }


def write_numpy(directory: Path) -> dict[str, Facts]:
    """``.npy`` and ``.npz``."""
    several: dict[str, Any] = arrays()
    np.savez(directory / "arrays.npz", **several)
    np.save(directory / "array.npy", several["layer.weight"])
    return {"arrays.npz": facts_of(several), "array.npy": facts_of({"": several["layer.weight"]})}


def write_torch(directory: Path) -> dict[str, Facts]:
    """PyTorch's own files, of several kinds of content."""
    tensors = torch_tensors()
    torch.save(tensors, directory / "dictionary.pt")
    shared = torch.arange(24, dtype=torch.float32)
    views = {"whole": shared, "part": shared[8:16], "tied": shared}
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    parameters = {name: torch.nn.Parameter(value) for name, value in module.named_parameters()}
    checkpoint = {"epoch": 3, "state": {"views": views}, "list": [shared[:4], (shared[4:8],)], "own": parameters}
    torch.save(checkpoint, directory / "checkpoint.pt")
    torch.save(module.state_dict(), directory / "protocol5.pt", pickle_protocol=5)
    flat = {f"state.views.{name}": view for name, view in views.items()}
    flat |= {"list.0": shared[:4], "list.1.0": shared[4:8]}
    flat |= {f"own.{name}": value.detach() for name, value in parameters.items()}
    return {
        "dictionary.pt": torch_facts(tensors),
        "checkpoint.pt": torch_facts(flat),
        "protocol5.pt": torch_facts(module.state_dict()),
    }


def write_safetensors(directory: Path) -> dict[str, Facts]:
    """safetensors."""
    tensors = torch_tensors()
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"made": "for a test"})
    return {"model.safetensors": torch_facts(tensors)}


def write_gguf(directory: Path) -> dict[str, Facts]:
    """GGUF with facts, plain and quantised tensors."""
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_context_length(4096)
    writer.add_token_list(["a", "b", "longer token"])
    writer.add_array("scores", [0.5, 1.5])
    facts: Facts = {}
    for dtype in ("float32", "float16", "float64", "int8", "int16", "int32", "int64"):
        array = (seeded_array((6, 32)) * 10).astype(dtype)
        writer.add_tensor(f"as.{dtype}", array)
        facts[f"as.{dtype}"] = [dtype, [6, 32], zlib.crc32(array.tobytes())]
    for name in QUANTISED:
        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quants.quantize(seeded_array((4, 64)), kind)
        writer.add_tensor(f"as.{name}", data, raw_dtype=kind)
        facts[f"as.{name}"] = [name.lower(), [4, 64], zlib.crc32(data.tobytes())]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"model.gguf": facts}


def write_onnx(directory: Path) -> dict[str, Facts]:
    """ONNX with its weights inside, and beside it."""
    weights = {name: seeded_array(shape, seed=1) for name, shape in SHAPES.items() if 0 not in shape}
    weights["wide"] = seeded_array((64, 64)).astype(ml_dtypes.bfloat16)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "graph",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save_model(onnx.helper.make_model(graph), directory / "inside.onnx")
    onnx.save_model(
        onnx.helper.make_model(graph),
        directory / "beside.onnx",
        save_as_external_data=True,
        location="beside.bin",
        size_threshold=0,
    )
    return {"inside.onnx": facts_of(weights), "beside.onnx": facts_of(weights)}


def main() -> None:
    """Write all in the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    writers = (write_numpy, write_torch, write_safetensors, write_gguf, write_onnx)
    report({"files": {name: facts for write in writers for name, facts in write(directory).items()}})


if __name__ == "__main__":
    run(main)
