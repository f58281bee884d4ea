"""What is loaded: directories of a bucket, each written when it is first asked for, and the programs that load them."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import REPOSITORY, Child
from tests.benchmarks.data import BUCKET, content
from tests.benchmarks.models.places import BUSY_HTTP, BUSY_HTTPS, DISTANT, HTTP, HTTPS
from tests.benchmarks.scale import MIB
from tests.services.buckets import uploaded

BUILD_S = 300
BLOCK = 8 * MIB
TENSOR = MIB
FRAMEWORKS, MXNET = "frameworks", "mxnet"
ENVIRONMENTS = {FRAMEWORKS: ".venv-frameworks", MXNET: ".venv-mxnet"}
LLAMA, LLAMA_32 = "Llama, transformers", "Llama of 32 shards, transformers"
SHARDS_MAPPED, TENSORS = "Llama's shards, safe_open", "Llama's tensors, copied"
RESNET, VGG, ONNX = "ResNet-50, MXNet", "VGG-16, MXNet", "ONNX, external data"
FILE, SHARDS = "file", "shards"
HEADER, RANDOM = "header", "random"
SMALL, FILE_READ = "small files", "one file, read"


SHORT = (*("llama", "llama-32", "tensors", "mapped", "resnet", "vgg", "onnx", "small", "file-read"), *(HEADER, RANDOM))
"""The names of all programs on the command line."""
SHARD_COUNTS = {"llama": 10, "llama-32": 32}
COUNT = 4
"""Of the shards of the model whose headers are read."""


class MissingError(LookupError):
    """An environment that a program needs is not here."""


@dataclass(frozen=True, slots=True)
class Case:
    """A program that loads a directory, from these *places* unless others are asked for.

    *environment* is that of the program's framework, none for the benchmarks' own. *streamed* is the program that does
    the same by Run:ai's streamer.
    """

    name: str
    short: str
    directory: str
    program: str
    environment: str = ""
    infers: bool = False
    places: tuple[str, ...] = (HTTPS,)
    arguments: tuple[str, ...] = ()
    streamed: str = ""

    def child(self, streaming: Mapping[str, str] | None = None) -> Child:
        """The program, which waits for a path; with variables for *streaming*, that one. Raises MissingError."""
        program = self.program if streaming is None else self.streamed
        python = interpreter(self.environment)
        return Child(f"models.programs.{program}", *self.arguments, environment=streaming, python=python)


def cases(bench: Bench) -> list[Case]:
    """All that load whole models."""
    count = str(bench.scale.small_files)
    torch, mxnet = FRAMEWORKS, MXNET
    all_near = (HTTPS, HTTP, BUSY_HTTPS, BUSY_HTTP)
    return [
        Case(LLAMA, "llama", "llama", "llama", torch, infers=True, places=(*all_near, DISTANT)),
        Case(LLAMA_32, "llama-32", "llama-32", "llama", torch, infers=True),
        Case(TENSORS, "tensors", "llama", "tensors", torch, streamed="tensors_streamed"),
        Case(SHARDS_MAPPED, "mapped", "llama", "mapped_shards", torch),
        Case(RESNET, "resnet", "resnet50", "mxnet_network", mxnet, infers=True),
        Case(VGG, "vgg", "vgg16", "mxnet_network", mxnet, infers=True),
        Case(ONNX, "onnx", "onnx", "onnx_session", torch, infers=True),
        Case(SMALL, "small", "small", "read_files", arguments=("--count", count), places=(HTTPS, DISTANT)),
        Case(FILE_READ, "file-read", FILE, "read_files", places=(*all_near, DISTANT)),
    ]


def chosen(bench: Bench, programs: Collection[str]) -> list[Case]:
    """The cases of these short names, or all, whose environments are here; the results say which are left out."""
    found = []
    for case in cases(bench):
        if programs and case.short not in programs:
            continue
        try:
            interpreter(case.environment)
        except MissingError as missing:
            bench.results.skipped.append(f"{case.name}: {missing}")
        else:
            found.append(case)
    return found


def interpreter(environment: str) -> Path:
    """The interpreter of an environment that the Makefile makes. Raises MissingError."""
    if not environment:
        return Path(sys.executable)
    python = REPOSITORY / ENVIRONMENTS[environment] / "bin/python"
    if not python.exists():
        raise MissingError(f"no {ENVIRONMENTS[environment]}")
    return python


def written(bench: Bench, directory: str) -> Path:
    """A directory of the store, with what belongs there. Raises MissingError, CalledProcessError and TimeoutExpired."""
    path = bench.data.store / BUCKET / directory
    if not path.exists():
        bench.console.print(f"[dim]writing {directory}[/dim]", highlight=False)
        staged = bench.work / f"{directory}-staged"
        _builders(bench)[directory](staged)
        for file in staged.iterdir():
            uploaded(file)
        staged.rename(path)
        os.sync()
    return path


def _builders(bench: Bench) -> dict[str, Callable[[Path], None]]:
    scale = bench.scale
    layers, width = map(str, scale.llama)
    return {
        **{
            name: partial(_program, FRAMEWORKS, "llama_build", [layers, width, str(count)])
            for name, count in SHARD_COUNTS.items()
        },
        "resnet50": partial(_network, "resnet50"),
        "vgg16": partial(_network, "vgg16"),
        "onnx": partial(_program, FRAMEWORKS, "onnx_build", [str(scale.onnx)]),
        "small": partial(_small, scale.small_files, scale.small_size),
        FILE: partial(_safetensors, scale.file, ["model.safetensors"]),
        SHARDS: partial(_safetensors, scale.shard, [shard(number) for number in range(COUNT)]),
    }


def _program(environment: str, name: str, options: Sequence[str], directory: Path) -> None:
    command = [str(interpreter(environment)), "-W", "ignore", "-m", f"tests.benchmarks.models.programs.{name}"]
    subprocess.run(
        [*command, directory, *options], cwd=REPOSITORY, check=True, timeout=BUILD_S, capture_output=True, text=True
    )


def _network(name: str, directory: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests/evaluation")}
    command = [str(interpreter(MXNET)), "-W", "ignore", "-m", "zoo", name, str(directory)]
    subprocess.run(command, env=environment, check=True, timeout=BUILD_S, capture_output=True, text=True)


def _small(count: int, size: int, directory: Path) -> None:
    directory.mkdir(parents=True)
    for number in range(count):
        (directory / f"{number:06}").write_bytes(content(size, number))


def shard(number: int) -> str:
    """The name of a shard of the model whose headers are read."""
    return f"model-{number + 1:05}-of-{COUNT:05}.safetensors"


def _safetensors(size: int, names: Sequence[str], directory: Path) -> None:
    """Files with a tensor for each MiB."""
    header = {
        f"layers.{number}.weight": {
            "dtype": "U8",
            "shape": [TENSOR],
            "data_offsets": [number * TENSOR, (number + 1) * TENSOR],
        }
        for number in range(size // TENSOR)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir(parents=True)
    for file_number, name in enumerate(names):
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for number in range(size // BLOCK):
                file.write(content(BLOCK, file_number * size // BLOCK + number))
