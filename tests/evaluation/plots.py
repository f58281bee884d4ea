"""Results as SVG, after the paper's figures 7 to 10."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.evaluation.results import IDEAL, NATIVE, SHARED, Results, load_s, p99_speedups, total_s
from tests.evaluation.setting import Model

_COLORS = {"native warm": "#888888", "host": "#1f77b4", IDEAL: "#2ca02c"}


def draw(results: Results, models: Sequence[Model], directory: Path) -> list[str]:
    """Write what there are results for; the names of the files."""
    drawn = []
    for title, large in (("small", False), ("large", True)):
        names = [model.name for model in models if model.large is large]
        if results.ratios(names, "native warm", "host", total_s):
            drawn += [_speedups(results, names, directory / f"speedup-{title}.svg")]
            drawn += [_latencies(results, names, directory / f"latency-{title}.svg")]
    if results.batches:
        drawn += [_clients(results, directory / "clients.svg")]
    return drawn


def _speedups(results: Results, names: Sequence[str], path: Path) -> str:
    """The paper's figures 7 and 8: how many times as fast each model is."""
    bars = {
        label: (color, results.ratios(names, "native warm", "host", value))
        for label, value, color in (("loading", load_s, "#1f77b4"), ("end to end", total_s, "#ff7f0e"))
    }
    return _bars(names, bars, "times as fast as MXNet, warm", path, mark=1)


def _latencies(results: Results, names: Sequence[str], path: Path) -> str:
    """The paper's figure 9: what a request takes, beside the ideal."""
    medians = {
        place: (color, {name: results.median(name, place, total_s) for name in names})
        for place, color in _COLORS.items()
    }
    return _bars(names, medians, "seconds, end to end", path)


def _bars(
    names: Sequence[str],
    bars: Mapping[str, tuple[str, Mapping[str, float | None]]],
    label: str,
    path: Path,
    *,
    mark: float | None = None,
) -> str:
    """Bars for each model beside each other, each with its color and its known values by model; a line at *mark*."""
    figure = Figure(figsize=(max(6, 0.32 * len(names)), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(bars)
    for offset, (title, (color, values)) in enumerate(bars.items()):
        known = {names.index(name) + width * offset: value for name, value in values.items() if value is not None}
        axes.bar(list(known), list(known.values()), width, label=title, color=color)
    if mark is not None:
        axes.axhline(mark, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    axes.set_ylabel(label)
    axes.legend(fontsize="small")
    return _save(figure, path)


def _clients(results: Results, path: Path) -> str:
    """The paper's figure 10: the gain in the 99th percentile by share of the models and clients."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for share in dict.fromkeys(batch.share for batch in results.batches):
        counts = [batch.clients for batch in results.batches if (batch.way, batch.share) == (SHARED, share)]
        gains = [
            p99_speedups(results.batch(NATIVE, share, count), results.batch(SHARED, share, count)) or 0.0
            for count in counts
        ]
        axes.plot(counts, gains, marker="o", label=f"{share:.0%} of the models")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("clients")
    axes.set_ylabel("p99 gain, geometric mean over models")
    axes.legend(fontsize="small")
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, metadata={"Date": None})
    return path.name
