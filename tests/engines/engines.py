"""Which engines are tried: a program of `programs` each, one of its ways to load, and what is known of it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(__file__).with_name("programs")
LIGHT, ENGINES, HEAVY, MXNET = ".venv-frameworks", ".venv-engines", ".venv-heavy", ".venv-mxnet"
"""Environments that the Makefile makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One row of the table: *title* as documents name it, *copies* why what is not shared is copied, if it is known."""

    program: str
    way: str
    title: str
    environment: str = ENGINES
    copies: str = ""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return f"{self.program}/{self.way}"

    @property
    def python(self) -> Path:
        """The interpreter that has the engine; it may be absent."""
        variable = f"TEST_{self.environment[6:].upper()}"
        return Path(os.environ.get(variable, REPOSITORY / self.environment)) / "bin/python"


def _of(program: str, environment: str = ENGINES, **ways: tuple[str, str]) -> Iterator[Engine]:
    for way, (title, copies) in ways.items():
        yield Engine(program=program, way=way.replace("_", "-"), title=title, copies=copies, environment=environment)


_PLAIN_READ = "reads the file into its own memory"
_UNPACKS = "its format is not its memory's layout"

ENGINE_ROWS: tuple[Engine, ...] = (
    *_of(
        "transformers_llama",
        LIGHT,
        whole=("transformers, sharded Llama", ""),
        tied=("transformers, tied embeddings", ""),
    ),
    *_of("transformers_llama", device_map=("transformers, `device_map`", "")),
    *_of("diffusers_pipeline", pipeline=("diffusers, `DDPMPipeline`", "")),
    *_of("sentence_encoder", encode=("sentence-transformers", "")),
    *_of("torch_formats", LIGHT, load=("`torch.load`", _PLAIN_READ), load_mmap=("`torch.load(mmap=True)`", "")),
    *_of("torch_programs", LIGHT, jit=("`torch.jit.load`", _PLAIN_READ), export=("`torch.export.load`", _PLAIN_READ)),
    *_of(
        "safetensors_files",
        LIGHT,
        load_file=("safetensors, `load_file`", ""),
        safe_open=('safetensors, `safe_open(path, "pt")`', ""),
        o_direct=("a reader with `O_DIRECT`", _PLAIN_READ),
    ),
    *_of(
        "safetensors_files",
        runai=("Run:ai Model Streamer", _PLAIN_READ),
        fastsafetensors=("fastsafetensors, without GPUDirect", _PLAIN_READ),
    ),
    *_of(
        "onnx_models",
        LIGHT,
        large=("ONNX Runtime, external data", "packs weights for its kernels"),
        large_not_packed=("ONNX Runtime, `session.disable_prepacking`", ""),
    ),
    *_of(
        "onnx_models",
        silero=("ONNX Runtime, silero-vad", _UNPACKS),
        magika=("ONNX Runtime, magika", _UNPACKS),
        rapidocr=("ONNX Runtime, rapidocr", _UNPACKS),
        openvino=("OpenVINO IR", "packs weights for its kernels"),
    ),
    *_of(
        "tables",
        neighbours=('scikit-learn neighbours, `joblib.load(mmap_mode="r")`', ""),
        forest=('scikit-learn forest, `joblib.load(mmap_mode="r")`', _UNPACKS),
        xgboost=("XGBoost", _UNPACKS),
        lightgbm=("LightGBM", _UNPACKS),
    ),
    *_of(
        "vectors",
        faiss=("faiss", _PLAIN_READ),
        faiss_mmap=("faiss, `IO_FLAG_MMAP`", ""),
        hnswlib=("hnswlib", _PLAIN_READ),
    ),
    *_of("gguf_llama", node=("llama.cpp (node-llama-cpp), GGUF", "")),
    *_of("tensorflow_saved", HEAVY, saved_model=("TensorFlow SavedModel", _PLAIN_READ)),
    *_of("orbax_checkpoint", HEAVY, restore=("JAX, Orbax", _UNPACKS)),
    *_of("mxnet_arrays", MXNET, nd_load=("MXNet, `mx.nd.load`; [`trimsfs run`](#mxnet-trimsfs-run) maps", _PLAIN_READ)),
    *_of(
        "databases",
        sqlite=("SQLite, `mode=ro`", "reads pages as queries need them"),
        sqlite_immutable=("SQLite, `immutable=1`", "reads pages as queries need them"),
        duckdb=("DuckDB, `read_only`", "reads blocks as queries need them"),
        parquet=("DuckDB on Parquet", _UNPACKS),
        arrow=("Arrow, `memory_map`", ""),
    ),
)


def builder(engine: Engine) -> Engine:
    """Of those with the same program, one whose environment has most of what it builds."""
    same = [each for each in ENGINE_ROWS if each.program == engine.program and each.python.exists()]
    return max(same, key=lambda each: each.environment == ENGINES)


def command(engine: Engine, action: str, argument: str | Path, *more: str) -> list[str]:
    """The command line of a program."""
    if engine.way == "node" and action == "load":
        package = REPOSITORY / ENGINES / "node/node_modules/node-llama-cpp/dist/index.js"
        return ["node", f"{PROGRAMS}/{engine.program}.mjs", str(package)]
    module = f"tests.engines.programs.{engine.program}"
    return [str(engine.python), "-W", "ignore", "-m", module, action, str(argument), *more]
