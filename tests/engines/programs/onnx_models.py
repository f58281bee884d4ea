"""ONNX Runtime and OpenVINO: real networks that Python packages carry, and one with external data."""

import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.engines.programs.common import WIDTH, Way, floats, main, matrices

REAL = {
    "silero": ("silero_vad", "**/silero_vad.onnx"),
    "magika": ("magika", "**/standard_v3_3/model.onnx"),
    "rapidocr": ("rapidocr_onnxruntime", "**/*rec*.onnx"),
}
"""The package and the file of each."""
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "silero": {"input": (1, 512), "state": (2, 1, 128), "sr": ()},
    "rapidocr": {"x": (1, 3, 48, 320)},
}


def build(directory: Path, divide: int) -> None:
    """Copies of the files, a large network with external data, and that as OpenVINO writes it."""
    for name, (package, pattern) in REAL.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue  # an environment that has only some
        found = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
        shutil.copy(found[0], directory / f"{name}.onnx")
    _large(directory, divide)
    if find_spec("openvino") is not None:
        import openvino

        openvino.save_model(
            openvino.convert_model(directory / "large.onnx"), directory / "large.xml", compress_to_fp16=False
        )


def _large(directory: Path, divide: int) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = [numpy_helper.from_array(matrix, f"w{layer}") for layer, matrix in enumerate(matrices(divide))]
    layers = len(weights)
    nodes = [helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"]) for layer in range(layers)]
    ends = [helper.make_tensor_value_info(f"x{layer}", TensorProto.FLOAT, [1, WIDTH]) for layer in (0, layers)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, directory / "large.onnx", save_as_external_data=True, location="large.data", size_threshold=0)


def _inputs(session: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
    found = {}
    for each in session.get_inputs():
        shape = shapes.get(each.name, tuple(size if isinstance(size, int) else 1 for size in each.shape))
        found[each.name] = np.full(shape, 16000 if each.name == "sr" else 1, types[each.type])
    return found


def onnx_session(directory: Path, name: str, *, packed: bool = True) -> tuple[object, bytes]:
    """A session on a path, and one run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(directory / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    output = np.asarray(session.run(None, _inputs(session, SHAPES.get(name, {})))[0])
    return session, floats(output.ravel()[:64].tolist())


def openvino_model(directory: Path, name: str) -> tuple[object, bytes]:
    """OpenVINO's own reader, which maps weights."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(directory / name), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    output = compiled(np.ones((1, WIDTH), np.float32))[0]
    return (core, compiled), floats(np.asarray(output).ravel()[:64].tolist())


if __name__ == "__main__":
    real: dict[str, Way] = {name: (f"{name}.onnx", partial(onnx_session, name=name)) for name in REAL}
    large: dict[str, Way] = {
        "large": ("large.[od]*", lambda directory: onnx_session(directory, "large")),
        "large-not-packed": ("large.[od]*", lambda directory: onnx_session(directory, "large", packed=False)),
        "openvino": ("large.[xb]*", lambda directory: openvino_model(directory, "large.xml")),
    }
    main(build, real | large)
