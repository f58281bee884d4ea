"""What is loaded: directories of a bucket, each written when it is first asked for, and the programs that load them."""

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import REPOSITORY, Child
from tests.benchmarks.data import BUCKET, content
from tests.benchmarks.scale import KIB, MIB
from tests.services.buckets import uploaded

BUILD_S = 300
BLOCK = 8 * MIB
TENSOR = MIB
ENVIRONMENTS = {"frameworks": ".venv-frameworks", "mxnet": ".venv-mxnet"}
LLAMA, SHARDS_MAPPED, SHARDS_READ = "Llama, transformers", "Llama's shards, safe_open", "Llama's shards, read"
RESNET, VGG, ONNX = "ResNet-50, MXNet", "VGG-16, MXNet", "ONNX, external data"
FILE, SPARSE = "file", "sparse"
SMALL, FILE_READ, FILE_MAPPED = "small files", "one file, read", "one file, mapped"


class MissingError(LookupError):
    """An environment that a program needs is not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A program that loads a directory. *everywhere*: from all endpoints, or else from one near and one distant.

    *environment* is that of the program's framework, none for the benchmarks' own.
    """

    name: str
    short: str
    directory: str
    program: str
    environment: str = ""
    infers: bool = False
    everywhere: bool = False
    arguments: tuple[str, ...] = ()

    def child(self) -> Child:
        """The program, which waits for a path. Raises MissingError."""
        return Child(f"models.programs.{self.program}", *self.arguments, python=interpreter(self.environment))


def cases(bench: Bench) -> list[Case]:
    """All that load whole models."""
    count = str(bench.scale.small_files)
    torch, mxnet = "frameworks", "mxnet"
    return [
        Case(
            name=LLAMA,
            short="llama",
            directory="llama",
            program="llama",
            environment=torch,
            infers=True,
            everywhere=True,
        ),
        Case(name=SHARDS_MAPPED, short="mapped", directory="llama", program="mapped_shards", environment=torch),
        Case(name=SHARDS_READ, short="read", directory="llama", program="read_files"),
        Case(
            name=RESNET,
            short="resnet",
            directory="resnet50",
            program="mxnet_network",
            environment=mxnet,
            infers=True,
        ),
        Case(name=VGG, short="vgg", directory="vgg16", program="mxnet_network", environment=mxnet, infers=True),
        Case(name=ONNX, short="onnx", directory="onnx", program="onnx_session", environment=torch, infers=True),
        Case(name=SMALL, short="small", directory="small", program="read_files", arguments=("--count", count)),
        Case(name=FILE_READ, short="file-read", directory=FILE, program="read_files"),
        Case(name=FILE_MAPPED, short="file-mapped", directory=FILE, program="map_file"),
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
        if directory != SPARSE:  # of which nobody reads all
            for file in staged.iterdir():
                uploaded(file)
        staged.rename(path)
        os.sync()
    return path


def _builders(bench: Bench) -> dict[str, Callable[[Path], None]]:
    scale = bench.scale
    layers, width = map(str, scale.llama)
    return {
        "llama": partial(_program, "frameworks", "llama_build", [layers, width]),
        "resnet50": partial(_network, "resnet50"),
        "vgg16": partial(_network, "vgg16"),
        "onnx": partial(_program, "frameworks", "onnx_build", [str(scale.onnx)]),
        "small": partial(_small, scale.small_files, scale.small_size),
        FILE: partial(_safetensors, scale.big),
        SPARSE: partial(_sparse, scale.sparse),
    }


def _program(environment: str, name: str, options: Sequence[str], directory: Path) -> None:
    command = [str(interpreter(environment)), "-W", "ignore", "-m", f"tests.benchmarks.models.programs.{name}"]
    subprocess.run(
        [*command, directory, *options], cwd=REPOSITORY, check=True, timeout=BUILD_S, capture_output=True, text=True
    )


def _network(name: str, directory: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "tests/evaluation")}
    command = [str(interpreter("mxnet")), "-W", "ignore", "-m", "zoo", name, str(directory)]
    subprocess.run(command, env=environment, check=True, timeout=BUILD_S, capture_output=True, text=True)


def _small(count: int, size: int, directory: Path) -> None:
    directory.mkdir(parents=True)
    for number in range(count):
        (directory / f"{number:06}").write_bytes(content(size, number))


def _safetensors(size: int, directory: Path) -> None:
    """A file with a tensor for each MiB."""
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
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number in range(size // BLOCK):
            file.write(content(BLOCK, number))


def _sparse(size: int, directory: Path) -> None:
    """A file that is mostly holes: 4 KiB of data in each MiB."""
    directory.mkdir(parents=True)
    block = random.Random(0).randbytes(4 * KIB)
    with (directory / "model.bin").open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, MIB):
            os.pwrite(file.fileno(), block, offset)
