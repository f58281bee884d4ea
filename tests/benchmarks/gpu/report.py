"""Results of a card as tables, as markdown and for JSON."""

from collections.abc import Iterator, Mapping

from tests.benchmarks.gpu import bench, card, fill, load, memory
from tests.benchmarks.report import cell, samples
from tests.benchmarks.results import RATES, SHARES, TRIMSFS, Results
from tests.benchmarks.scale import GIB
from tests.benchmarks.tables import Table

Facts = Mapping[str, str | int | bool]

WARNING = "EMULATED: of no GPU, the figures mean nothing"
TITLES = {
    bench.FIRST: "By a server that was just mounted",
    fill.FILL: "From the host's memory to the card",
    fill.FETCH: "From the store to the card",
    load.LOAD: "Until a process has tensors",
    memory.MEMORY: "What many processes take",
}
BASES = {fill.FILL: fill.PLAIN, fill.FETCH: fill.TO_DISK, load.LOAD: load.TORCH_LOAD, memory.MEMORY: load.TORCH_LOAD}
"""What the others are compared with, where it could be measured."""
NOTES = {
    bench.FIRST: "From the store; it makes the server's context and pins its memory, which no other figure has in it.",
    fill.FILL: "trimsfs: a client opens the control file of a copy, and has read what it tells; that takes device "
    "memory and copies the file, which is in the page cache. Pinned copies: a process copies as many bytes through a "
    "ring of 64 MiB of pinned memory by two streams, into device memory that it has taken before; the ring holds any "
    "bytes, or is filled from the file, in the page cache too, by four threads.",
    fill.FETCH: "The endpoint emulates S3 and answers from memory. To the card is to disk as well.",
    load.LOAD: "From the call to tensors that can be used, without imports; the file is in the page cache, the server "
    "has its context. Each line is a process of its own; those of trimsfs ask one after the other and keep what they "
    "have.",
    memory.MEMORY: "What processes take by loading, all of them together, once each has a context; then for each "
    "context, at the peak of the median process, and of the server with its own context. PSS does not show pinned "
    "memory; MemAvailable does, and whatever else the host does meanwhile.",
}


def tables(results: Results, facts: Facts) -> Iterator[Table]:
    """The groups, in order; an emulated one says so in its title."""
    warning = f" ({WARNING})" if facts["emulated"] else ""
    for group in results.groups():
        if group == load.LOAD:
            cases = dict.fromkeys(key.case for key in results.series if key.group == group)
            for case in cases:
                yield _by_contender(results, group, case, f"{TITLES[group]}, {case}{warning}")
        else:
            yield _by_case(results, group, f"{TITLES[group]}{warning}")


def _by_case(results: Results, group: str, title: str) -> Table:
    """A line for each measurement, with the contenders beside each other."""
    rows = list(results.rows(group))
    contenders = list(dict.fromkeys(contender for _, _, row in rows for contender in row))
    lines = []
    for name, case, row in rows:
        base = row.get(BASES.get(group, ""))
        median = base.median if base is not None and len(row) > 1 and name not in SHARES else None
        lines.append([f"{name}, {case}", *(cell(name, row.get(contender), median) for contender in contenders)])
    return Table(title, ["", *contenders], lines)


def _by_contender(results: Results, group: str, case: str, title: str) -> Table:
    """A line for each contender, with the measurements beside each other."""
    rows = {name: row for name, of, row in results.rows(group) if of == case}
    contenders = sorted(
        dict.fromkeys(contender for row in rows.values() for contender in row),
        key=lambda name: not name.startswith(TRIMSFS),
    )
    medians = {name: row[BASES[group]].median if BASES[group] in row else None for name, row in rows.items()}
    lines = [
        [contender, *(cell(name, row.get(contender), medians[name]) for name, row in rows.items())]
        for contender in contenders
    ]
    return Table(title, ["", *rows], lines)


def markdown(results: Results, facts: Facts) -> str:
    """A section for docs/performance.md."""
    about = [
        f"`make bench-gpu`, measured {facts['date']} in one {facts['scale']} run, everything on one machine:",
        f"{facts['cpu']}, {facts['cores']} cores, {int(facts['memory_bytes']) / GIB:.0f} GiB,",
        f"Linux {facts['kernel']}, Python {facts['python']};",
        f"{card.text(facts)};",
        f"trimsfs {facts['trimsfs']}, {facts['libraries']}.",
        "",
        "Each cell: the median (least - most) of some rounds, in which contenders took turns, and the ratio to",
        "what is named below the table; of rates more is better, of all else less. What was not measured says why.",
    ]
    parts = ["## On a GPU", *([f"**{WARNING}**"] if facts["emulated"] else []), "\n".join(about)]
    groups = [group for group in results.groups() for _ in range(_count(results, group))]
    for group, table in zip(groups, tables(results, facts), strict=True):
        ratios = f"Ratios are to {BASES[group]}. " if group in BASES else ""
        parts += [table.markdown("###"), ratios + NOTES[group]]
    parts += [f"Left out: {text}" for text in results.skipped] + [f"Failed: {text}" for text in results.failures]
    return "\n\n".join(parts) + "\n"


def _count(results: Results, group: str) -> int:
    return len({key.case for key in results.series if key.group == group}) if group == load.LOAD else 1


def document(results: Results, facts: Facts) -> dict[str, object]:
    """All samples, the machine and the card."""
    warning = WARNING if facts["emulated"] else None
    return {"warning": warning, "machine": facts, "rates": sorted(RATES), **samples(results)}
