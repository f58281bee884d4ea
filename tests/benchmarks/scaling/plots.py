"""What grows as SVG: a figure for each group, both axes logarithmic, with the slopes."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks.results import BYTES, SHARES, Results
from tests.benchmarks.scale import MIB
from tests.benchmarks.scaling.slopes import GROUPS, names, points, slope

CPU_WORDS = "processor time"


def draw(results: Results, directory: Path) -> list[Path]:
    """Write what there are results for; returns the files."""
    return [_draw(results, group, directory) for group in GROUPS if names(results, group)]


def _draw(results: Results, group: str, directory: Path) -> Path:
    timed = [name for name in names(results, group) if name not in BYTES | SHARES]
    panels = {
        "seconds": [name for name in timed if CPU_WORDS not in name],
        "seconds of processors": [name for name in timed if CPU_WORDS in name],
        "MiB": [name for name in names(results, group) if name in BYTES],
    }
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    figure.suptitle(group)
    for axes, (unit, shown) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _panel(axes, results, group, unit, shown)
    path = directory / f"{group.replace(': ', '-').replace(' ', '-')}.svg"
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    return path


def _panel(axes: Axes, results: Results, group: str, unit: str, shown: list[str]) -> None:
    for name in shown:
        measured = points(results, group, name)
        if measured:
            counts, values = zip(*measured, strict=True)
            exponent = slope(measured)
            label = name if exponent is None else f"{name}: {exponent:.2f}"
            axes.plot(counts, [value / MIB if unit == "MiB" else value for value in values], marker="o", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(group.partition(": ")[2])
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
