"""Emulated CUDA devices, for trying things by hand: prints the environment to export, and serves until interrupted.

``python -m tests.cuda --devices 2 --memory 64MiB DIR``
"""

import argparse
import contextlib
import shlex
import signal
from pathlib import Path

from pydantic import ByteSize, TypeAdapter

from . import KernelDriver, environment


def main() -> None:
    """Serve devices of one size."""
    parser = argparse.ArgumentParser(prog="tests.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="for the socket")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--memory", type=TypeAdapter(ByteSize).validate_python, default=64 << 20, help="of each device")
    parser.add_argument("--transparent", action="store_true", help="the host can use device pointers")
    arguments = parser.parse_args()
    arguments.directory.mkdir(exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    with KernelDriver(arguments.directory, [arguments.memory] * arguments.devices) as kernel:
        for name, value in environment(kernel, transparent=arguments.transparent).items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
