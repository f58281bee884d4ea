"""Traces as Chrome trace JSON, which chrome://tracing and Perfetto draw: a process for each open, requests in lanes."""

from collections.abc import Iterator, Sequence
from typing import Any

from trimsfs.text import printable


def chrome_trace(traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document of some traces, as `.trims/traces` has them; times are in microseconds since the epoch."""
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            event for number, trace in enumerate(traces, 1) for event in _events(number, trace, trace["began"] * 1e6)
        ],
    }


def _events(process: int, trace: dict[str, Any], began_us: float) -> Iterator[dict[str, Any]]:
    yield _named("process_name", process, 0, printable(trace["path"]))
    whole = {"name": "cold open", "start": 0.0, "duration": trace["duration"]}
    facts = {name: trace[name] for name in ("id", "why", "size", "thread", "open_duration", "error")}
    yield _event(process, 0, whole | {"facts": facts}, began_us)
    ends: list[float] = []
    for span in sorted(trace["spans"], key=lambda span: span["start"]):
        # Events of one lane must not overlap. Rounding may let neighbours do so by less than a microsecond.
        lane = next((lane for lane, end in enumerate(ends) if end <= span["start"] + 1e-6), len(ends))
        if lane == len(ends):
            ends.append(0.0)
            yield _named("thread_name", process, lane + 1, f"lane {lane + 1}")
        ends[lane] = span["start"] + span["duration"]
        for each in (span, *span.get("parts", ())):
            yield _event(process, lane + 1, each, began_us)


def _event(process: int, lane: int, span: dict[str, Any], began_us: float) -> dict[str, Any]:
    place = {"ts": began_us + span["start"] * 1e6, "dur": span["duration"] * 1e6, "pid": process, "tid": lane}
    return {"name": span["name"], "cat": "trimsfs", "ph": "X", **place, "args": span.get("facts", {})}


def _named(what: str, process: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": lane, "args": {"name": name}}
