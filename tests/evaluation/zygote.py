"""A process that has MXNet ready and answers each request in a child of its own, as a function service keeps one warm,
or with ``--once`` one request, by itself.

Reads requests from standard input, one line of JSON each, and prints one line for each answer, in the order in which
they come to be. Plain MXNet: nothing here knows how what it loads comes to it, but for *ideal* requests, whose arrays
are there before the request begins.
"""

import hashlib
import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

# Each request has one core, whatever else runs; OpenMP reads this once, when MXNet loads it.
os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx
import numpy as np

PHASES = ("load_s", "create_s", "forward_s", "free_s")


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    ready: dict[str, dict[str, Any]] = {}
    mx.nd.zeros((1,)).wait_to_read()
    _print({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        directory = request["directory"]
        if request["ideal"] and directory not in ready:
            ready[directory] = _over_local_file(directory)
        if sys.argv[1:] == ["--once"] or os.fork() == 0:
            _answer(request, ready.get(directory) if request["ideal"] else None)


def _over_local_file(directory: str) -> dict[str, Any]:
    """The arrays of a model, mapped: what a request is given for nothing."""
    import trimsfs

    arrays: dict[str, Any] = trimsfs.open(f"{directory}/params").mxnet()
    return arrays


def _answer(request: dict[str, Any], arrays: dict[str, Any] | None) -> None:
    try:
        answer = _measured(request, arrays)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    _print({"id": request["id"], **answer})
    os._exit(0)


def _measured(request: dict[str, Any], arrays: dict[str, Any] | None) -> dict[str, object]:
    """Read the parameters, create a predictor, infer one image, free everything: the time that each takes."""
    directory, shape = request["directory"], tuple(request["shape"])
    image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    private = _private_bytes() if request["memory"] else 0
    clock = [time.perf_counter()]
    loaded = mx.nd.load(f"{directory}/params") if arrays is None else arrays
    clock.append(time.perf_counter())
    symbol = mx.sym.load(f"{directory}/symbol.json")
    arguments = {name[4:]: array for name, array in loaded.items() if name.startswith("arg:")}
    states = {name[4:]: array for name, array in loaded.items() if name.startswith("aux:")}
    executor = symbol.bind(mx.cpu(), {**arguments, "data": mx.nd.array(image)}, aux_states=states, grad_req="null")
    clock.append(time.perf_counter())
    output = executor.forward(is_train=False)[0].asnumpy()
    clock.append(time.perf_counter())
    private = _private_bytes() - private if request["memory"] else 0
    began = time.perf_counter()
    del loaded, arguments, states, executor
    clock.append(clock[-1] + time.perf_counter() - began)
    times = {name: after - before for name, (before, after) in zip(PHASES, pairwise(clock), strict=True)}
    digest = hashlib.sha256(output.tobytes()).hexdigest()
    return {**times, "total_s": clock[-1] - clock[0], "private_bytes": private, "output": digest}


def _private_bytes() -> int:
    """What this process has written to: memory that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty:"))


def _print(answer: dict[str, object]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")  # in one piece, whoever else writes


if __name__ == "__main__":
    main()
