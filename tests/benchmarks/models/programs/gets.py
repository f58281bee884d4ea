"""Plain GETs of one object by its URL, without an SDK: what the wire can do.

With one worker it times one GET over a connection that is there; with more, all parts of the object, which are read
and thrown away.
"""

import argparse
import http.client
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

BLOCK = 1 << 20


class Getter:
    """A connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = f"{parts.path}?{parts.query}"
        self._connection = http.client.HTTPConnection(parts.netloc)
        self._buffer = bytearray(BLOCK)

    def get(self, begin: int, end: int) -> None:
        """Get a range and read all of it."""
        self._connection.request("GET", self._target, headers={"Range": f"bytes={begin}-{end - 1}"})
        answer = self._connection.getresponse()
        got = 0
        while count := answer.readinto(self._buffer):
            got += count
        if got != end - begin:
            raise EOFError(f"{answer.status}: {got} of {end - begin} bytes")


def main() -> None:
    """Connect, wait for the word, get, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--part", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    getters = [Getter(options.url) for _ in range(options.workers)]
    for getter in getters:
        getter.get(0, 1)
    print("ready", flush=True)
    sys.stdin.readline()

    def share(number: int) -> None:
        for begin in range(number * options.part, options.size, options.workers * options.part):
            getters[number].get(begin, min(begin + options.part, options.size))

    begun = time.perf_counter()
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(share, range(options.workers)))
    print(json.dumps({"seconds": time.perf_counter() - begun}), flush=True)


if __name__ == "__main__":
    main()
