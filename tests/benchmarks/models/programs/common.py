"""How the programs are told what to do, and answer."""

import json
import sys
import time
import zlib
from collections.abc import Callable


def serve(load: Callable[[str], Callable[[], bytes]], *, infers: bool = True) -> None:
    """Wait for a path, load what is there, use it, tell the times.

    *load* returns what infers, and gives the bytes of the output; where nothing *infers*, those of what was read.
    """
    print("ready", flush=True)
    path = sys.stdin.readline().rstrip("\n")
    clock = [time.perf_counter()]
    infer = load(path)
    clock.append(time.perf_counter())
    output = infer()
    clock.append(time.perf_counter())
    outcome = {"load_s": clock[1] - clock[0], "digest": f"{zlib.crc32(output):08x}"}
    print(json.dumps(outcome | ({"infer_s": clock[2] - clock[1]} if infers else {})), flush=True)
