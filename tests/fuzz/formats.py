"""Feed damaged model files to the parsers: ``python -m tests.fuzz.formats --count 1000000 --seed 1 [--only FORMAT]``.

Every file either has a table or is refused with a FormatError, in time and with next to no memory. Prints how many of
each; what else a parser does ends the run with the seed of the file that made it.
"""

import argparse
import random
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.model_files import FILES
from trimsfs.formats import BufferSource, FormatError, parse

SECONDS_FOR_ONE = 2
MEMORY = 32 << 20
"""Bytes that the whole run may take more than at its start."""
MOST_DAMAGES = 8
NUMBERS = (
    *(0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF),
    *(1 << 40, 1 << 62, (1 << 64) - 1),
)

Damage = Callable[[random.Random, bytearray], None]


def _flip(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _replace(chance: random.Random, data: bytearray) -> None:
    data[chance.randrange(len(data))] = chance.randrange(256)


def _number(chance: random.Random, data: bytearray) -> None:
    size = chance.choice((1, 2, 4, 8))
    at = chance.randrange(len(data))
    data[at : at + size] = struct.pack("<Q", chance.choice(NUMBERS) & (1 << 64) - 1)[:size]


def _remove(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.randrange(1, 17)]


def _repeat(chance: random.Random, data: bytearray) -> None:
    at, length = chance.randrange(len(data)), chance.randrange(1, 65)
    data[at:at] = data[at : at + length] * chance.randrange(1, 9)


def _cut(chance: random.Random, data: bytearray) -> None:
    del data[chance.randrange(1, len(data) + 1) :]


DAMAGES: tuple[Damage, ...] = (_flip, _replace, _replace, _number, _number, _remove, _repeat, _cut)


def damaged(seed: str, original: bytes) -> bytes:
    """The file that a seed makes of another."""
    chance = random.Random(seed)
    data = bytearray(original)
    for _ in range(chance.randrange(1, MOST_DAMAGES + 1)):
        if data:
            chance.choice(DAMAGES)(chance, data)
    return bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.formats", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="files of each format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(FILES))
    options = parser.parse_args()
    _limit_memory()
    signal.signal(signal.SIGALRM, _too_slow)
    for kind in [options.only] if options.only else FILES:
        name, original = FILES[kind]
        refused = 0
        for number in range(options.count):
            seed = f"{options.seed}/{kind}/{number}"
            data = damaged(seed, original)
            signal.setitimer(signal.ITIMER_REAL, SECONDS_FOR_ONE)
            try:
                parse(BufferSource(data), name)
            except FormatError as error:
                if isinstance(error.__context__, MemoryError):
                    print(f"seed {seed!r}", file=sys.stderr)
                    raise
                refused += 1
            except BaseException:
                print(f"seed {seed!r}", file=sys.stderr)
                raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"{kind}: {refused} of {options.count} refused", flush=True)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS_FOR_ONE} s")


if __name__ == "__main__":
    main()
