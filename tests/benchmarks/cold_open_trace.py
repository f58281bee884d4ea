"""Draw the cold opens of a sharded model: ``python -m tests.benchmarks.cold_open_trace [--output DIR]``, as root.

The store is an emulated endpoint at a distance. Prints how much of each open its spans explain.
"""

import argparse
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.benchmarks.bench import PROFILE_LATENCY_MS, PROFILE_RATE, PROFILE_TEXT
from tests.services import SCRATCH
from tests.services.fast import start_fast
from tests.support.mounts import mounted, trimsfs
from trimsfs.extras.tracing.trace import covered_s

SHARDS, SIZE = 4, 64 << 20
BUCKET, MODEL = "models", "llama"
COLORS = {
    "lookup": "#9467bd",
    "kernel": "#c5b0d5",
    "index": "#8c564b",
    "wait": "#d62728",
    "first byte": "#ffbb78",
    "receive": "#1f77b4",
    "checksum": "#2ca02c",
    "write": "#98df8a",
    "request": "#aec7e8",
    "record": "#7f7f7f",
    "ask digest": "#e377c2",
    "compare digest": "#f7b6d2",
    "load": "#bcbd22",
    "announce": "#17becf",
    "reopen": "#000000",
    "first read": "#ff7f0e",
}


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/performance"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="trimsfs-bench-", dir=SCRATCH) as scratch:
        traces = _traces(Path(scratch))
    for trace in traces:
        share = covered_s(trace["spans"]) / trace["duration"]
        print(f"{Path(trace['path']).name}: {trace['duration'] * 1e3:.0f} ms, of which spans explain {share:.1%}")
    _draw(traces, output / "cold-open-trace.svg")


def _traces(work: Path) -> list[dict[str, Any]]:
    """The traces of a program that reads all shards at once."""
    shards = [f"{MODEL}/model-{number:05}-of-{SHARDS:05}.safetensors" for number in range(1, SHARDS + 1)]
    for shard in shards:
        path = work / "buckets" / BUCKET / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(SIZE))
    with (
        start_fast(work / "buckets", latency_ms=PROFILE_LATENCY_MS, rate=PROFILE_RATE) as server,
        mounted(f"s3://{BUCKET}", work / "mount", environment=server.environment()) as mount,
    ):
        with ThreadPoolExecutor(SHARDS) as threads:
            sizes = threads.map(lambda shard: len((mount.path / shard).read_bytes()), shards)
            assert list(sizes) == [SIZE] * SHARDS
        done = trimsfs("trace", mount.path / MODEL, "--json")
        assert done.returncode == 0, done.stderr
        return sorted(json.loads(done.stdout), key=lambda trace: str(trace["path"]))


def _draw(traces: list[dict[str, Any]], path: Path) -> None:
    """A row for the spans of each open, and one for each of its requests."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    labels: list[str] = []
    for trace in traces:
        offset = trace["began"] - min(each["began"] for each in traces)
        requests = [span for span in trace["spans"] if span["name"] == "request"]
        others = [span for span in trace["spans"] if span["name"] != "request"]
        rows = [others, *([request, *request.get("parts", ())] for request in requests)]
        name = Path(trace["path"]).name.partition("-of-")[0]
        labels += [name, *([""] * len(requests))]
        for number, row in enumerate(rows, len(labels) - len(rows)):
            for span in row:
                place = [((offset + span["start"]) * 1e3, span["duration"] * 1e3)]
                axes.broken_barh(place, (number, 0.85), color=COLORS.get(span["name"], "#cccccc"))
    axes.set_yticks([number + 0.4 for number, label in enumerate(labels) if label], [one for one in labels if one])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds since the first lookup")
    axes.set_title(f"{SHARDS} shards of {SIZE >> 20} MiB, read at once; store at {PROFILE_TEXT}")
    used = {part["name"] for trace in traces for span in trace["spans"] for part in span.get("parts", (span,))}
    for name, color in COLORS.items():
        if name in used:
            axes.barh(0, 0, color=color, label=name)
    figure.legend(loc="outside right upper")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
