"""Plain GETs of one object by its URL, without an SDK: what the wire can do.

Each worker gets the first ``--size`` bytes over a connection that is there, and throws them away.
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
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = kind(parts.netloc)
        self._buffer = bytearray(BLOCK)

    def get(self, size: int) -> None:
        """Get so many bytes and read all of them."""
        self._connection.request("GET", self._target, headers={"Range": f"bytes=0-{size - 1}"})
        answer = self._connection.getresponse()
        got = 0
        while count := answer.readinto(self._buffer):
            got += count
        if got != size:
            raise EOFError(f"{answer.status}: {got} of {size} bytes")


def main() -> None:
    """Connect, wait for the word, get, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    getters = [Getter(options.url) for _ in range(options.workers)]
    for getter in getters:
        getter.get(1)
    print("ready", flush=True)
    sys.stdin.readline()

    begun = time.perf_counter()
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(Getter.get, getters, [options.size] * options.workers))
    print(json.dumps({"seconds": time.perf_counter() - begun}), flush=True)


if __name__ == "__main__":
    main()
