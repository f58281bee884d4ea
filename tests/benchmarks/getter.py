"""One process of the references: plain ranged GETs by boto3, ``python -m tests.benchmarks.getter``.

Speaks as `reader` does. ``--target`` names a file that the chunks of this worker are written to; without it, a few
single GETs are timed, from the call to the first and to the last byte of the body.
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

from tests.services import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SINGLE_GETS = 5
PIECE = 1 << 20


def fill(client: "S3Client", options: argparse.Namespace) -> dict[str, float]:
    """Get every *workers*-th chunk of the object and write its pieces to the target at their offsets."""
    target = os.open(options.target, os.O_WRONLY)
    begun = time.perf_counter()
    for offset in range(options.worker * options.length, options.size, options.workers * options.length):
        end = min(offset + options.length, options.size)
        answer = client.get_object(Bucket=options.bucket, Key=options.key, Range=f"bytes={offset}-{end - 1}")
        position = offset
        # Read and written piece by piece as fast as boto3 can: larger and smaller pieces are slower.
        for piece in answer["Body"].iter_chunks(PIECE):
            position += os.pwrite(target, piece, position)
        if position != end:
            raise EOFError(f"{options.key}: {position - offset} of {end - offset} bytes")
    return {"begun": begun, "ended": time.perf_counter()}


def single(client: "S3Client", options: argparse.Namespace) -> dict[str, float]:
    """Time single GETs over a connection that is already there."""
    client.head_object(Bucket=options.bucket, Key=options.key)
    firsts, lasts = [], []
    for number in range(SINGLE_GETS):
        offset = number * options.length % max(1, options.size - options.length + 1)
        begun = time.perf_counter()
        answer = client.get_object(
            Bucket=options.bucket, Key=options.key, Range=f"bytes={offset}-{offset + options.length - 1}"
        )
        answer["Body"].read(1)
        firsts.append(time.perf_counter() - begun)
        answer["Body"].read()
        lasts.append(time.perf_counter() - begun)
    return {"first_s": statistics.median(firsts), "last_s": statistics.median(lasts)}


def main() -> None:
    """Connect, wait for the word, act, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("endpoint", "bucket", "key"):
        parser.add_argument(name)
    for name, default in (("size", 0), ("length", 0), ("worker", 0), ("workers", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--target")
    options = parser.parse_args()
    client = S3Server(options.endpoint, "fast", "fast").client()
    # What boto3 loads at its first request is not part of a GET.
    client.head_bucket(Bucket=options.bucket)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps((fill if options.target else single)(client, options)), flush=True)


if __name__ == "__main__":
    main()
