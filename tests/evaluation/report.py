"""Results as tables and in Markdown."""

from collections.abc import Callable, Iterable, Sequence

from tests.benchmarks.scale import MIB
from tests.benchmarks.tables import Table
from tests.evaluation.results import (
    IDEAL,
    NATIVE,
    PLACES,
    SHARED,
    Request,
    Results,
    geometric,
    load_s,
    p99_speedups,
    percentile,
    private_bytes,
    total_s,
)
from tests.evaluation.setting import Model

PAPER = {
    ("small", "end to end, warm"): "0.38x SqueezeNet to 24x VGG16",
    ("large", "end to end, warm"): "5x to 210x",
    ("clients", "MXNet / trimsfs"): "up to 8x",
    ("clients", "trimsfs / ideal"): "up to 1.2x",
}
"""What the paper tells, of models in a GPU's memory instead of the host's."""


def tables(results: Results, models: Sequence[Model]) -> list[Table]:
    """All tables there are results for."""
    measured = {request.model for request in results.requests}
    single = [model for model in models if model.name in measured]
    made = []
    if single:
        made += [_times("Loading: ms until the parameters are arrays", results, single, load_s)]
        made += [_times("End to end: ms for one request", results, single, total_s)]
        made += [_gains(results, single)]
    if results.batches:
        made += [_batches(results)]
    if results.policies:
        made += [_policies(results)]
    if results.foldings:
        made += [_foldings(results)]
    summary = _summary(results, single)
    return [*made, summary] if summary.rows else made


def _times(title: str, results: Results, models: Sequence[Model], value: Callable[[Request], float]) -> Table:
    rows = [
        [model.name, f"{model.nbytes / MIB:.0f}"]
        + [_milliseconds(results.median(model.name, place, value)) for place in PLACES]
        for model in models
    ]
    places = "; ".join(f"{place}: {what}" for place, what in PLACES.items())
    return Table(title, ["model", "MiB", *PLACES], rows, f"Medians. {places}.")


def _gains(results: Results, models: Sequence[Model]) -> Table:
    rows = []
    for model in models:
        copies = [results.median(model.name, place, private_bytes) for place in ("native warm", "host")]
        rows.append(
            [model.name]
            + [_times_text(results.ratio(model.name, "native warm", "host", value)) for value in (load_s, total_s)]
            + [_times_text(results.ratio(model.name, "native download", "cold", total_s))]
            + [_times_text(results.ratio(model.name, "host", IDEAL, total_s))]
            + ["" if each is None else f"{each / MIB:.0f}" for each in copies]
        )
    columns = ["model", "loading, warm", "end to end, warm", "end to end, cold", "host / ideal"]
    columns += ["own, MXNet", "own, trimsfs"]
    note = "Warm: native warm / host. Cold: native download / cold. Own: memory that a request has written to."
    return Table("How many times as fast as MXNet by itself, and MiB of a process's own", columns, rows, note)


def _summary(results: Results, models: Sequence[Model]) -> Table:
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for label, large in (("small", False), ("large", True)):
        names = [model.name for model in models if model.large is large]
        for what, place, other, value in (
            ("loading, warm", "native warm", "host", load_s),
            ("end to end, warm", "native warm", "host", total_s),
            ("end to end, cold", "native download", "cold", total_s),
            ("host / ideal", "host", IDEAL, total_s),
        ):
            ratios[label, what] = results.ratios(names, place, other, value)
    for what, one, other in (("MXNet / trimsfs", NATIVE, SHARED), ("trimsfs / ideal", SHARED, IDEAL)):
        ratios["clients", what] = {
            f"{share:.0%} {clients}": results.batch(one, share, clients).wall_s
            / results.batch(other, share, clients).wall_s
            for share, clients in _cells(results)
        }
    rows = []
    for (label, what), found in ratios.items():
        if found:
            order = sorted(found, key=found.__getitem__)
            ends = [f"{_times_text(found[name])} {name}" for name in (order[0], order[-1])]
            rows.append([label, what, _times_text(geometric(found.values())), *ends, PAPER.get((label, what), "")])
    columns = ["models", "ratio", "geometric mean", "least", "most", "the paper"]
    note = "Ideal is what cannot be beaten: a ratio to it that is far below 1 tells how much the machine's noise is."
    return Table("In short", columns, rows, note)


def _cells(results: Results) -> list[tuple[float, int]]:
    """Shares of the models and numbers of clients that were measured."""
    return list(dict.fromkeys((batch.share, batch.clients) for batch in results.batches))


def _batches(results: Results) -> Table:
    rows = []
    for share, clients in _cells(results):
        native, shared, ideal = (results.batch(way, share, clients) for way in (NATIVE, SHARED, IDEAL))
        rows.append(
            [f"{share:.0%}", str(clients)]
            + [f"{batch.wall_s:.1f}" for batch in (native, shared, ideal)]
            + [_times_text(native.wall_s / shared.wall_s), _times_text(shared.wall_s / ideal.wall_s)]
            + [_times_text(p99_speedups(native, shared))]
            + [_milliseconds(percentile(each.all_latencies, rank)) for rank in (0.5, 0.99) for each in (native, shared)]
            + [f"{batch.private_bytes / MIB:.0f}" for batch in (native, shared)]
        )
    columns = ["of models", "clients", "MXNet s", "trimsfs s", "ideal s", "gain", "trimsfs / ideal", "p99 gain"]
    columns += ["p50 MXNet", "p50 trimsfs", "p99 MXNet", "p99 trimsfs", "own MiB, MXNet", "own MiB, trimsfs"]
    title = "Clients under a Pareto(1, 1) load: batches, latencies in ms, most memory of processes' own"
    return Table(title, columns, rows)


def _policies(results: Results) -> Table:
    rows = [
        [each.name, f"{each.fetched / MIB:.0f}", f"{each.fetched / each.asked:.1%}", f"{1e3 * each.mean_s:.0f}"]
        for each in results.policies
    ]
    columns = ["policy", "MiB fetched", "of what was read", "mean ms a read"]
    return Table("Eviction under a budget of half of the models", columns, rows)


def _foldings(results: Results) -> Table:
    rows = [
        [folding.model, str(folding.processes), f"{folding.nbytes / MIB:.0f}"]
        + [f"{each / folding.nbytes:.2f}" for each in (folding.own, folding.own_folded, folding.all_folded)]
        + [f"{1e3 * each:.0f}" for each in (folding.before_s, folding.after_s)]
        for folding in results.foldings
    ]
    columns = ["model", "processes", "MiB", "own before", "own after", "all after", "ms before", "ms after"]
    return Table("Folding: copies of the weights in all processes together, and ms an inference", columns, rows)


def markdown(made: Iterable[Table], results: Results, facts: dict[str, str | int], drawn: Sequence[str]) -> str:
    """All tables and plots, and where they were made."""
    about = [f"{name}: {value}" for name, value in facts.items()]
    about += [*(f"failed: {failure}" for failure in results.failures), *remarks(results, facts)]
    parts = ["# Evaluation", "\n".join(f"- {each}" for each in about), *(table.markdown() for table in made)]
    return "\n\n".join([*parts, "\n".join(f"![{name}]({name})" for name in drawn)]) + "\n"


def remarks(results: Results, facts: dict[str, str | int]) -> list[str]:
    """What there is to know of a run."""
    count, differing = results.outputs(), results.differing()
    remarks = [f"outputs are equal from every place: {len(count) - len(differing)} of {len(count)} models"]
    if facts["scale"] == "quick":
        remarks.append("a quick run: that it works is what it shows, its samples are too few for figures")
    return remarks


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:.1f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _times_text(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
