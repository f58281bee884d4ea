"""One way of fetching a whole object into a file: ``python -m tests.benchmarks.ways WAY ENDPOINT BUCKET KEY``.

Speaks as `reader` does. All ways compute the CRC32C of what they write, as whoever caches must. Meanwhile a trio loop
in this process wakes each millisecond and notes how late it is: so long would the open of another file wait.

threads
    boto3 in threads of this process.
awscrt
    The SDK's client in C, which calls back into this process.
processes
    boto3 in threads of two other processes of low priority.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import trio

from tests.benchmarks.children import REPOSITORY
from tests.benchmarks.reader import percentile
from tests.benchmarks.scale import MIB
from tests.services import S3Server
from trimsfs.checksums import crc32c

PART = 8 * MIB
PIECE = MIB // 4
WRITE = 2 * MIB
THREADS = 8
PROCESSES = 2
NICENESS = 10
TICK_S = 0.001


def threads(options: argparse.Namespace, parts: range, count: int = THREADS) -> None:
    """Get these parts by boto3 in so many threads."""
    client = S3Server(options.endpoint, "fast", "fast").client()
    target = os.open(options.target, os.O_WRONLY)

    def part(number: int) -> None:
        start, stop = number * PART, min((number + 1) * PART, options.size)
        answer = client.get_object(Bucket=options.bucket, Key=options.key, Range=f"bytes={start}-{stop - 1}")
        buffer, filled, crc = memoryview(bytearray(WRITE)), 0, 0
        while piece := answer["Body"].read(PIECE):
            crc = crc32c(piece, crc)
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == WRITE or start + filled == stop:
                os.pwrite(target, buffer[:filled], start)
                start, filled = start + filled, 0

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(part, parts))


def awscrt(options: argparse.Namespace, parts: range) -> None:
    """Get the whole object by the client in C, parts of it at once."""
    from awscrt.auth import AwsCredentialsProvider  # of this way alone
    from awscrt.http import HttpHeaders, HttpRequest
    from awscrt.s3 import S3Client, S3RequestTlsMode, S3RequestType, create_default_s3_signing_config

    del parts
    target = os.open(options.target, os.O_WRONLY)
    checksums: dict[int, int] = {}

    def on_body(chunk: bytes, offset: int, **_: object) -> None:
        checksums[offset] = crc32c(chunk)
        os.pwrite(target, chunk, offset)

    credentials = AwsCredentialsProvider.new_static("fast", "fast")
    client = S3Client(
        region="us-east-1",
        signing_config=create_default_s3_signing_config(region="us-east-1", credential_provider=credentials),
        tls_mode=S3RequestTlsMode.DISABLED,
        part_size=PART,
        throughput_target_gbps=10,
    )
    headers = HttpHeaders([("host", urlsplit(options.endpoint).netloc)])
    request = client.make_request(
        type=S3RequestType.GET_OBJECT,
        request=HttpRequest("GET", f"/{options.bucket}/{options.key}", headers),
        on_body=on_body,
    )
    request.finished_future.result(timeout=120)


def processes(options: argparse.Namespace, parts: range) -> None:
    """Get the parts in other processes."""
    del parts
    command = [sys.executable, "-m", "tests.benchmarks.ways", *sys.argv[1:]]
    workers = [
        subprocess.Popen(
            [*command, f"--worker={number}"], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for number in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    options.begin()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    for worker in workers:
        spent, _ = worker.communicate(timeout=120)
        options.cpu_before -= float(spent)


WAYS: dict[str, Callable[[argparse.Namespace, range], None]] = {
    function.__name__: function for function in (threads, awscrt, processes)
}


async def timed(options: argparse.Namespace) -> dict[str, float]:
    """Fetch beside a loop that ticks."""
    late: list[float] = []
    begun = trio.Event()
    times: list[float] = []
    options.begin = partial(trio.from_thread.run_sync, begun.set)

    def fetch() -> None:
        if options.way != "processes":
            options.begin()
        WAYS[options.way](options, range(-(-options.size // PART)))
        times.append(time.perf_counter())

    async def tick() -> None:
        await begun.wait()
        times.append(time.perf_counter())
        while True:
            before = time.perf_counter()
            await trio.sleep(TICK_S)
            late.append(time.perf_counter() - before - TICK_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        await trio.to_thread.run_sync(fetch)
        nursery.cancel_scope.cancel()
    late.sort()
    return {"seconds": times[1] - times[0], "cpu_s": cpu_s() - options.cpu_before, "late_p99": percentile(late, 0.99)}


def cpu_s() -> float:
    """CPU time of this process so far."""
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def main() -> None:
    """Wait for the word, fetch, print; as a worker, fetch a share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    for name in ("endpoint", "bucket", "key"):
        parser.add_argument(name)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--worker", type=int)
    options = parser.parse_args()
    print("ready", flush=True)
    sys.stdin.readline()
    options.cpu_before = cpu_s()
    if options.worker is not None:
        os.nice(NICENESS)
        threads(options, range(options.worker, -(-options.size // PART), PROCESSES), THREADS // PROCESSES)
        print(cpu_s() - options.cpu_before, flush=True)
        return
    print(json.dumps(trio.run(timed, options)), flush=True)


if __name__ == "__main__":
    main()
