"""Load a model, infer, and print what came out: ``first_output PROGRAM DIRECTORY``, PROGRAM a module beside this one.

With ``--told`` it says that it is ready once the model is loaded, and infers when it is given a line. In any case it
ends after another line.
"""

import argparse
import importlib
import json
import os
import sys
import time
import zlib


def main() -> None:
    """Do that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("directory")
    parser.add_argument("--told", action="store_true")
    options = parser.parse_args()
    infer = importlib.import_module(f"tests.benchmarks.models.programs.{options.program}").load(options.directory)
    if options.told:
        print("ready", flush=True)
        sys.stdin.readline()
    begun = time.perf_counter()
    output = infer()
    seconds = time.perf_counter() - begun
    print(json.dumps({"digest": f"{zlib.crc32(output):08x}", "infer_s": seconds, "pid": os.getpid()}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
