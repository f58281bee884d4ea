"""``trimsfs trace``: what the last cold opens waited for, as a table, as Chrome trace JSON, or by OpenTelemetry."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from trimsfs.cli.control_client import check_answers, on_this_host, read_lines, records_of
from trimsfs.cli.output import fail_if_any, reported, say, show
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import ConfigurationError, NoSuchEntryError, TrimsError
from trimsfs.extras.tracing.chrome_trace import chrome_trace
from trimsfs.mountinfo import Mount
from trimsfs.text import printable

FOLLOW_INTERVAL_S = 2.0
SHOWN_SPANS = 3
"""Kinds of spans of an open that the table names, those that took longest."""


@click.command(
    epilog=examples(
        "trimsfs trace",
        "trimsfs trace /models/llama --output llama.json",
        "trimsfs trace --otlp http://127.0.0.1:4318 --follow",
    )
)
@click.argument("path", type=Path, shell_complete=complete_mounted, required=False)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write Chrome trace JSON; - is standard output."
)
@click.option("--otlp", "endpoint", metavar="URL", help="Send to an OpenTelemetry receiver, by OTLP over HTTP.")
@click.option("--follow", is_flag=True, help="With --otlp: go on with the next opens, until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def trace(path: Path | None, output: Path | None, endpoint: str | None, follow: bool, as_json: bool) -> None:
    """Show what the last cold opens waited for.

    Of all mounts of this host, or of PATH and what is below it.

    Chrome trace JSON opens in chrome://tracing and https://ui.perfetto.dev.
    """
    if follow and endpoint is None:
        raise ConfigurationError("--follow needs --otlp URL")
    if endpoint is not None:
        _send(path, endpoint, follow=follow)
        return
    failures: list[tuple[str, str]] = []
    traces = _traces(path, failures)
    if path is not None and not traces:
        try:
            path.lstat()
        except FileNotFoundError as error:
            raise NoSuchEntryError(f"{path}: {error.strerror}") from None
    if not traces and not as_json:
        say("no cold opens", error=output is not None)
    if output is not None:
        text = json.dumps(chrome_trace(traces))
        try:
            click.echo(text) if str(output) == "-" else output.write_text(text)
        except OSError as error:
            raise ConfigurationError(f"--output {output}: {error.strerror}: name another file") from None
    elif as_json:
        click.echo(json.dumps(traces, indent=2))
    elif traces:
        _show(traces)
    fail_if_any(failures)


def _traces(path: Path | None, failures: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The traces of all mounts, or of a path and what is below it, the oldest first. Raises TrimsError of a path."""
    return sorted(records_of(path, _traces_of, failures), key=lambda trace: trace["began"])


def _traces_of(mount: Mount) -> list[dict[str, Any]]:
    """The traces of a mount, with their paths on this host."""
    check_answers(mount.mountpoint)
    try:
        traces = list(read_lines(mount.mountpoint / ".trims/traces", about=mount.mountpoint))
    except NoSuchEntryError:
        return []  # its server has an earlier version
    return [trace | {"mountpoint": str(mount.mountpoint)} for trace in on_this_host(mount, traces)]


def _show(traces: Sequence[dict[str, Any]]) -> None:
    rows = [("PATH", "WHY", "OPEN", "TRACED", "")]
    for trace in traces:
        waited = trace["open_duration"] or 0.0
        outcome = f"{trace['error']}: " if trace["error"] else ("" if trace["done"] else "under way: ")
        path = printable(trace["path"])
        rows.append((path, trace["why"], _seconds(waited), _seconds(trace["duration"]), outcome + _longest(trace)))
    show(rows, left=2)


def _longest(trace: dict[str, Any]) -> str:
    """The kinds of spans that cover most of the time, as ``request 0.81 s, wait 0.02 s``."""
    covered = {
        name: covered_s(span for span in trace["spans"] if span["name"] == name)
        for name in {span["name"] for span in trace["spans"]}
    }
    longest = sorted(covered.items(), key=lambda each: -each[1])[:SHOWN_SPANS]
    return ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in longest)


def covered_s(spans: Iterable[dict[str, Any]]) -> float:
    """How much time at least one of the spans takes."""
    total = reached = 0.0
    for start, stop in sorted((span["start"], span["start"] + span["duration"]) for span in spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s"


def _send(path: Path | None, endpoint: str, *, follow: bool) -> None:
    """Send the traces that have ended, once or from time to time. Raises TrimsError."""
    from trimsfs.extras.tracing.otlp import Sender  # noqa: PLC0415 - its libraries are an extra

    sender, sent = Sender(endpoint), set[str]()
    while True:
        failures: list[tuple[str, str]] = []
        try:
            traces = [trace for trace in _traces(path, failures) if trace["done"]]
            sender.send([trace for trace in traces if trace["id"] not in sent])
            sent = {trace["id"] for trace in traces} | (sent if failures else set())
        except TrimsError as error:
            if not follow:
                raise
            failures.append((type(error).__name__, str(error)))
        if not follow:
            fail_if_any(failures)
            return
        for _, message in failures:
            say(f"trimsfs: {message}", error=True)
        time.sleep(FOLLOW_INTERVAL_S)
