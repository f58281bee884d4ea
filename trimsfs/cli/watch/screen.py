"""How `trimsfs top` shows what mounts have answered: lines for each mount, and a table of models."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from trimsfs.cli.control_reader import PROBLEMS
from trimsfs.cli.gpu import counted
from trimsfs.cli.output import share
from trimsfs.cli.watch.sample import RATES, History, Model, Sample
from trimsfs.text import printable

ORDERS: dict[str, tuple[str, Callable[[Model, float], float]]] = {
    "n": ("name", lambda _model, _rate: 0),
    "s": ("size", lambda model, _rate: model.size),
    "d": ("disk", lambda model, _rate: model.disk),
    "h": ("host", lambda model, _rate: model.host),
    "o": ("open", lambda model, _rate: model.open),
    "u": ("uses", lambda model, _rate: model.uses),
    "f": ("fetch", lambda _model, rate: rate),
}
"""The orders of models by the key that asks for them: name, and what is sorted by, the largest first."""
HEADINGS = ("MODEL", "SIZE", "DISK", "HOST", "GPU", "OPEN", "USES", "PINNED", "FETCH", "USED BY")
LEVELS = " ▁▂▃▄▅▆▇█"
"""What a sparkline is made of, from nothing to the most."""
SHOWN_WAITS = SHOWN_USERS = 5
WIDE = 120
"""Columns of a terminal that has room for a sparkline in each row."""
SILENT_S = 3.0
"""How long a mount may take to answer before a line says so."""

Row = tuple[str, Model, Sequence[float]]
"""A model's path, what is here of it, and its rates."""


def sparkline(rates: Iterable[float]) -> str:
    """Rates as a line of RATES bars, the highest for the largest of them, the last one at its right end."""
    rates = list(rates)
    most = max(rates, default=0)
    return "".join(LEVELS[math.ceil(rate / most * (len(LEVELS) - 1)) if most else 0] for rate in rates).rjust(RATES)


def ranked(histories: Iterable[History], order: str) -> list[Row]:
    """The models of all mounts in an order of ORDERS."""
    rows = [
        (path, model, tuple(history.models.get(path, ())))
        for history in histories
        if history.sample is not None
        for path, model in history.sample.models.items()
    ]
    key = ORDERS[order][1]
    return sorted(rows, key=lambda row: (-key(row[1], row[2][-1] if row[2] else 0), row[0]))


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Models as a table with its headings; one of GPUs only if anything is there."""
    whole = [HEADINGS, *map(_cells, rows)]
    left_out = HEADINGS.index("GPU") if not any(model.gpu for _, model, _ in rows) else len(HEADINGS)
    return [(*row[:left_out], *row[left_out + 1 :]) for row in whole]


def _cells(row: Row) -> tuple[str, ...]:
    path, model, rates = row
    users = [model.users[pid] for pid in sorted(model.users)]
    more = [f"{len(users) - SHOWN_USERS} more"] if len(users) > SHOWN_USERS else []
    return (
        printable(path),
        decimal(model.size),
        share(model.disk, model.size),
        share(model.host, model.size),
        decimal(model.gpu) if model.gpu else "",
        str(model.open or ""),
        str(model.uses or ""),
        "yes" if model.pinned == model.files else f"{model.pinned} files" if model.pinned else "",
        f"{decimal(int(rates[-1]))}/s" if rates and rates[-1] else "",
        ", ".join([*users[:SHOWN_USERS], *more]),
    )


def lines(history: History, now: float, *, asked: bool, brief: bool = False) -> Iterator[str]:
    """The lines about a mount; if *brief*, only those that cannot wait. *asked* tells that its answer is still to
    come."""
    mount, sample = history.mount, history.sample
    yield f"{mount.mountpoint}: {mount.source}"
    if history.problem is not None:
        yield f"  not answering: {history.problem}"
        return
    if asked and now - history.asked > SILENT_S:
        yield f"  no answer for {now - history.asked:.0f} s{'; before:' if sample is not None else ''}"
    if sample is None:
        return
    for what in PROBLEMS:
        if sample.facts.get(f"{what}_problem"):
            yield f"  problem  {what}: {sample.facts[f'{what}_problem']}"
    if not brief:
        yield from _numbers(history, sample)
    yield from _waits(sample, now)


def _numbers(history: History, sample: Sample) -> Iterator[str]:
    """How much is here, and what comes."""
    budgets = {tier: sample.number(f"{tier}_budget_bytes") for tier in ("disk", "host")}
    limits = {tier: f" of {decimal(budget)}" if budget else "" for tier, budget in budgets.items()}
    yield (
        f"  disk     {decimal(sample.number('disk_used_bytes'))}{limits['disk']}, "
        f"memory {decimal(sum(model.host for model in sample.models.values()))}{limits['host']}, "
        f"{counted(sample.number('files_open_handles'), 'file')} open"
    )
    recent = sample.number("fetch_rate") if sample.number("fetch_in_flight") else 0
    yield (
        f"  fetch    {decimal(int(history.rates[-1]) if history.rates else recent)}/s "
        f"{sparkline(history.rates)} {counted(sample.number('fetch_in_flight'), 'request')} under way, "
        f"readers wait for {counted(sample.number('fetch_waiting'), 'queued chunk')}"
    )
    yield (
        f"  store    {counted(sample.number('store_requests_total'), 'request')}, "
        f"{counted(sample.number('store_failed_attempts_total'), 'attempt')} failed, "
        f"{counted(sample.number('fetch_failed_chunks_total'), 'chunk')} not fetched"
    )


def _waits(sample: Sample, now: float) -> Iterator[str]:
    """What waits for what: processes for paths, and jobs."""
    waits = sorted(sample.waits, key=lambda wait: -wait.seconds)
    for wait in waits[:SHOWN_WAITS]:
        yield f"  waits    {wait.process} for {wait.path}: {wait.seconds + now - sample.taken:.1f} s"
    if len(waits) > SHOWN_WAITS:
        yield f"  waits    {len(waits) - SHOWN_WAITS} more"
    for job in sample.jobs:
        reason = f": {job['waiting']}" if job["waiting"] else ""
        done = f"{decimal(job['done_bytes'])} of {decimal(job['total_bytes'])}"
        yield f"  job      {job['id']} {job['command']} {job['path']}, {done}{reason}"


def view(above: Sequence[str], rows: Sequence[Row], selected: str | None, footer: str, size: tuple[int, int]) -> Group:
    """All that a terminal of a *size*, columns and lines, shows: the lines *above*, as many models as have room, and
    the *footer*. The *selected* model is among them."""
    width, height = size
    above = above[: max(1, height - 6)]
    room = max(1, height - len(above) - 3)
    place = next((number for number, row in enumerate(rows) if row[0] == selected), 0)
    first = max(0, min(place - room // 2, len(rows) - room))
    shown = rows[first : first + room]
    one_line = partial(Text, no_wrap=True, overflow="ellipsis")
    headings, *body = table(shown)
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        outer = heading in {HEADINGS[0], HEADINGS[-1]}  # these get narrower first
        grid.add_column(one_line(heading), justify="left" if outer else "right", no_wrap=not outer)
    for (path, _, rates), (*most, users) in zip(shown, body, strict=True):
        if width >= WIDE:
            most[-1] = f"{sparkline(rates)} {most[-1]:>10}"
        grid.add_row(*map(one_line, (*most, users)), style="reverse" if path == selected else "")
    texts = [one_line(printable(line)) for line in above]
    filler = [Text("")] * (room - len(shown))
    return Group(*texts, Text(""), grid, *filler, one_line(footer, style="bold"))
