"""Kinds of store: one file from the same distance by the words of each, over an empty cache."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import get_args

from tests.benchmarks.bench import PROFILE_LATENCY_MS, PROFILE_RATE, Bench
from tests.benchmarks.contenders import trimsfs
from tests.benchmarks.data import BUCKET
from tests.benchmarks.measure.cold import FIRST, read
from tests.benchmarks.measure.references import WHOLE
from tests.benchmarks.results import TRIMSFS
from tests.benchmarks.scale import size_text
from tests.services.fast import FastS3
from tests.services.fast_clouds import Kind, start_fast_cloud, uploaded_to_cloud

STORES = "cold by kind of store, distant"
S3, GOOGLE, AZURE, HUB, REGISTRY = "s3", "gs", "az", "hf", "oci"


def stores(bench: Bench) -> None:
    """One endpoint serves the same file with the same delays: what differs is the request, and who asks."""
    size = bench.scale.store
    relative = bench.data.file(size)
    uploaded_to_cloud(bench.data.store / BUCKET / relative)
    with _endpoints(bench) as endpoints:
        for _ in range(bench.scale.cold_repetitions):
            for kind, server in endpoints.items():
                contender = trimsfs(name=contender_name(kind), store=server.store(BUCKET))
                measure = partial(read, bench, contender, server, relative)
                bench.take(STORES, size_text(size), contender.name, [FIRST, WHOLE], measure)


def contender_name(kind: str) -> str:
    """How the tables name trimsfs over a kind of store."""
    return f"{TRIMSFS}, {kind}://"


@contextmanager
def _endpoints(bench: Bench) -> Iterator[dict[str, FastS3]]:
    with ExitStack() as stack:
        clouds: dict[str, FastS3] = {
            kind: stack.enter_context(
                start_fast_cloud(kind, bench.data.store, latency_ms=PROFILE_LATENCY_MS, rate=PROFILE_RATE)
            )
            for kind in get_args(Kind)
        }
        yield {S3: bench.profile, **clouds}
