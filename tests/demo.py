"""The main job, shown: two processes load one model by path through a mount of the embedded default store.

Run by ``make demo`` as ``python -m tests.demo PYTHON``, where PYTHON has MXNet or, where that cannot be had, torch.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support.mounts import TRIMSFS, let_in, trimsfs
from trimsfs.options import default_store

PROGRAMS = Path(__file__).parent / "frameworks/programs"
PROCESSES = 2
TIMEOUT_S = 300
HAS_MXNET = "import sys, importlib.util; sys.exit(importlib.util.find_spec('mxnet') is None)"
"""Ends with 0 where it is installed; to import it takes seconds."""


def main() -> None:
    """Build the model in the default store, mount that, and have two processes load it."""
    python = sys.argv[1]
    mxnet = subprocess.run([python, "-c", HAS_MXNET], check=False).returncode == 0
    model, file, framework = ("resnet50", "params", "mxnet") if mxnet else ("resnet18", "model.pt", "torch")
    store = default_store()
    console = Console(width=100)
    if not mxnet:
        console.print("MXNet 1.9 needs Python 3.11 or older, which is not here: showing torch with ResNet-18 instead.")
    built = _run([python, str(PROGRAMS / f"{framework}_build.py"), str(store / model)])
    console.print(f"Model {model} ({built['bytes'][file] / 1e6:.1f} MB) is in the default store {store}.")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimsfs-demo-")))
        let_in(directory)
        mountpoint = directory / "models"
        mountpoint.mkdir()
        done = trimsfs("mount", mountpoint, "--cache-dir", directory / "cache")
        console.print(f"$ trimsfs mount {mountpoint}")
        if done.returncode != 0:
            sys.exit(done.stderr.strip())
        console.print(done.stdout.strip())
        stack.callback(trimsfs, "umount", mountpoint)
        program = [python, "-W", "ignore", str(PROGRAMS / f"{framework}_load.py"), str(mountpoint / model)]
        ways = {framework: program} | ({"trimsfs run": [TRIMSFS, "run", "--", *program]} if mxnet else {})
        results = {way: _load_at_once(command) for way, command in ways.items()}
        console.print(trimsfs("ls", mountpoint).stdout.rstrip())
    console.print(_table(f"{model}, loaded in {PROCESSES} processes at once", file, results))
    every = [result for way in results.values() for result in way]
    if len({result["output_sha256"] for result in every}) != 1:
        sys.exit("The processes computed different outputs.")
    if not all(result["pss_kib"] < result["rss_kib"] * 0.6 for result in every):
        sys.exit("The processes do not share the model's pages.")
    console.print(
        "Outputs are equal. Each process also maps the file to measure its pages, even one whose framework copies it: "
        "all have the same pages. RSS counts them whole in each of them, PSS divides them by the number of mappings. A "
        "process's own memory comes on top, with the interpreter, libraries and copies."
    )
    if mxnet:
        console.print(
            "MXNet by itself copies what it loads; under `trimsfs run` it maps it. What it rewrites when it infers is "
            "a process's own until it is found to be what others have rewritten: see docs/frameworks.md."
        )


def _load_at_once(command: list[str]) -> list[dict[str, Any]]:
    """Have processes load and map the model and measure while all of them map it."""
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    with ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        for process in processes:
            _line(process)
        results = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            results.append(_line(process))
        for process in processes:
            process.communicate(timeout=TIMEOUT_S)
    return results


def _line(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"A process ended with status {process.wait()}.")
    values: dict[str, Any] = json.loads(line)
    return values


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_S)
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def _table(title: str, file: str, results: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("by")
    for heading in ("load", "inference", "own memory", f"pages of {file}: RSS", "PSS"):
        table.add_column(heading, justify="right")
    for way, processes in results.items():
        for result in processes:
            table.add_row(
                way,
                f"{result['load_s'] * 1e3:.0f} ms",
                f"{result['infer_s'] * 1e3:.0f} ms",
                *(f"{result[name] / 1024:.1f} MiB" for name in ("own_kib", "rss_kib", "pss_kib")),
            )
    return table


if __name__ == "__main__":
    main()
