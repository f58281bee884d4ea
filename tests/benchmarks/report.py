"""Results as tables, as markdown and for JSON."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.benchmarks.bench import PROFILE_TEXT, TOUCHED_TIMES
from tests.benchmarks.budgets import verdicts
from tests.benchmarks.models.loads import GROUP as MODELS
from tests.benchmarks.models.machine import COMPUTING_FOR_EACH_CORE
from tests.benchmarks.models.places import SLOW_TEXT
from tests.benchmarks.models.ways import DOWNLOADS
from tests.benchmarks.results import BYTES, GETS, NATIVE, PEERS, RATES, RUNAI, S3FS, SHARES, TRIMSFS, Results, Series
from tests.benchmarks.scale import GIB, KIB, MIB
from tests.benchmarks.scaling import slopes
from tests.benchmarks.tables import Table

COMPARED = {"best download": DOWNLOADS, "best other mount": PEERS, S3FS: (S3FS,), RUNAI: (RUNAI,)}
_NONE = "-"
_UNITS = (
    (BYTES, (("GiB", GIB), ("MiB", MIB), ("KiB", KIB))),
    (RATES, (("GB/s", 1e9), ("MB/s", 1e6))),
    (SHARES, (("", 1),)),
)
_TIME_UNITS = (("s", 1), ("ms", 1e-3), ("µs", 1e-6))


def tables(results: Results) -> Iterator[Table]:
    """The budgets, then each group."""
    yield _budget_table(results)
    for group in results.groups():
        if group in slopes.GROUPS:
            yield _growth_table(results, group)
        elif group.startswith(MODELS):
            yield _model_table(results, group)
        else:
            yield _group_table(results, group)


def markdown(results: Results, machine: Mapping[str, str | int], plots: Sequence[Path]) -> str:
    """The whole report."""
    about = [
        f"Measured {machine['date']} in one {machine['scale']} run on one machine, everything on loopback:",
        f"{machine['cpu']}, {machine['cores']} cores, {int(machine['memory_bytes']) / GIB:.0f} GiB,",
        f"Linux {machine['kernel']}, Python {machine['python']};",
        f"trimsfs {machine['trimsfs']}, {machine['rclone']}, {machine['juicefs']}, {machine['s3fs']};",
        f"SeaweedFS {machine['seaweedfs']}.",
        "",
        _memory_text(int(machine["touched"])),
        "Every cache is empty before a cold measurement. Only the endpoint has its objects in memory, so that it never",
        "waits for a disk.",
        "",
        "Each cell: the median (least - most) where there are several samples, and the ratio to what is named last.",
        "The S3 endpoint is an emulation that answers from memory (`tests/services/fast.py`).",
        f'"Distant": {PROFILE_TEXT}. "GETs": plain ranged GETs by boto3 into one file.',
        "",
        'In the groups "models" the endpoint is SeaweedFS. "https" has a certificate of this run, which all trust;',
        f'"distant" and "slow" are https over a link: {PROFILE_TEXT}, and {SLOW_TEXT}.',
        f"At the busy ones {COMPUTING_FOR_EACH_CORE} programs for each core compute while a model loads, and before.",
        "A program has imported its framework before the time runs, every mount is at rest, and downloads and caches",
        "are on one disk. Processor time is all that the machine spends until the program has its output, also by the",
        "endpoint and the emulated link, but not by what computes beside it; with what follows: until nothing is done",
        "any more; without the server's: less what endpoint and link took. The rate of what computes is relative to",
        "just before the load; what it lost is the time that it takes alone for what it did not do.",
        '"GETs" are plain GETs there without an SDK that keep nothing; JuiceFS has its metadata on this machine.',
        "",
        'In the group "starts" a program runs from its exec on, over a mount that has its model in memory, with one',
        "thread. Processor time is that of all its processes, also of the fork server, up to its first output. Private",
        'memory is what it has written then and shares with nobody. "Model preloaded": a module of the program that',
        "loads the model and infers once is imported before the fork; plain python imports and loads the same.",
        "",
        'In the groups "scale" a column is how many there are of what grows, and the slope is the exponent of a fit to',
        'them, both axes logarithmic: 0 for what stays, 1 for what is linear. "At the end": between the last two.',
    ]
    parts = ["# Benchmarks", "\n".join(about)]
    parts += [f"![{path.stem.replace('-', ' ')}]({path.name})" for path in plots]
    parts += [table.markdown() for table in tables(results)]
    parts += [f"Left out: {text}" for text in results.skipped] + [f"Failed: {text}" for text in results.failures]
    return "\n\n".join(parts) + "\n"


def _memory_text(touched: int) -> str:
    """How memory was before each cold measurement."""
    if not touched:
        return "Memory is fresh: nothing is written or freed for a measurement, so that who runs first may pay for it."
    size = value_text("peak memory", touched)
    return (
        f"Memory is touched: just before each cold measurement of anyone a program writes {TOUCHED_TIMES} times the\n"
        f"bytes that are loaded, at most {size}, and ends."
    )


def document(results: Results, machine: Mapping[str, str | int]) -> dict[str, object]:
    """All samples, the budgets' numbers and the machine."""
    budgets = [
        {"name": budget.name, "value": value, "bound": budget.bound, "verdict": budget.word(value)}
        for budget, value in verdicts(results)
    ]
    return {"machine": machine, "budgets": budgets, **samples(results)}


def samples(results: Results) -> dict[str, object]:
    """All series, and what failed or was left out."""
    series = [
        {**key._asdict(), "samples": series.samples, "median": series.median, "note": series.note}
        for key, series in results.series.items()
    ]
    return {"series": series, "skipped": results.skipped, "failures": results.failures}


def value_text(name: str, value: float, *bounds: float) -> str:
    """A value, after it in parentheses the bounds of a range, and their unit, which goes by the name."""
    units = next((units for names, units in _UNITS if name in names), _TIME_UNITS)
    unit, factor = next((unit for unit in units if value >= unit[1]), units[-1])
    text = _number(value / factor)
    if bounds:
        text += f" ({' - '.join(_number(bound / factor) for bound in bounds)})"
    return f"{text} {unit}".rstrip()


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def base_of(row: Mapping[str, Series]) -> str | None:
    """What the others in a row are compared with: native, the faster peer, the references, or else the first."""
    if NATIVE in row and row[NATIVE].samples:
        return NATIVE
    medians = {name: series.median for name, series in row.items()}
    peers = {name: median for name in PEERS if (median := medians.get(name))}
    if peers:
        return min(peers, key=lambda name: peers[name])
    # One alone is compared with nothing.
    return next((name for name in (GETS, *row) if medians.get(name)), None) if len(row) > 1 else None


def _group_table(results: Results, group: str) -> Table:
    rows = list(results.rows(group))
    contenders = list(dict.fromkeys(name for _, _, row in rows for name in row))
    lines = []
    for name, case, row in rows:
        base = None if name in SHARES else base_of(row)
        cells = [cell(name, row.get(contender), row[base].median if base else None) for contender in contenders]
        lines.append([f"{name}, {case}", *cells, base or _NONE])
    return Table(group, ["", *contenders, "ratio to"], lines)


def _model_table(results: Results, group: str) -> Table:
    """A column for each contender, then for what trimsfs takes of what others do."""
    rows = list(results.rows(group))
    contenders = list(dict.fromkeys(name for _, _, row in rows for name in row))
    compared = {name: others for name, others in COMPARED.items() if set(others) & set(contenders)}
    lines = []
    for name, case, row in rows:
        cells = [cell(name, row.get(contender), None) for contender in contenders]
        ratios = [_ratio_text(row, others) for others in compared.values()]
        lines.append([f"{name}, {case}", *cells, *ratios])
    return Table(group, ["", *contenders, *(f"{TRIMSFS} / {name}" for name in compared)], lines)


def _ratio_text(row: Mapping[str, Series], others: Sequence[str]) -> str:
    """What trimsfs takes of the least that one of the others does."""
    ours, *theirs = (row[name].median if name in row else None for name in (TRIMSFS, *others))
    known = [median for median in theirs if median]
    return f"{ours / min(known):.2f}" if ours and known else _NONE


def _growth_table(results: Results, group: str) -> Table:
    """A row for each measurement, a column for each number of what grows, and then by which power it grows."""
    numbers = sorted(
        {number for name in slopes.names(results, group) for number in slopes.numbers(results, group, name)}
    )
    lines = []
    for name in slopes.names(results, group):
        by_number = slopes.numbers(results, group, name)
        cells = [cell(name, by_number.get(number), None) for number in numbers]
        measured = slopes.points(results, group, name)
        exponents = (slopes.slope(measured), slopes.last_slope(measured))
        lines.append([name, *cells, *(_NONE if exponent is None else f"{exponent:.2f}" for exponent in exponents)])
    return Table(group, ["", *(f"{number:,}" for number in numbers), "slope", "at the end"], lines)


def cell(name: str, series: Series | None, base: float | None) -> str:
    """A series as it is shown, with its ratio to the *base* if there is one."""
    if series is None:
        return _NONE
    median = series.median
    if median is None:
        return series.note
    bounds = (min(series.samples), max(series.samples)) if len(series.samples) > 1 else ()
    text = value_text(name, median, *bounds)
    if base:
        text += f" {median / base:.2f}x"
    return f"{text}, then {series.note}" if series.note else text


def _budget_table(results: Results) -> Table:
    rows = []
    for budget, value in verdicts(results):
        number = _NONE if value is None else budget.text(value)
        rows.append([budget.name, budget.description, budget.bound_text, number, budget.word(value)])
    return Table("budgets", ["", "what", "bound", "measured", ""], rows)
