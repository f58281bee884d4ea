"""Results as SVG."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks.measure import cold, growth, processes, warm
from tests.benchmarks.measure.references import WHOLE
from tests.benchmarks.results import BYTES, GETS, JUICEFS, NATIVE, RCLONE, S3FS, TRIMSFS, Results
from tests.benchmarks.scale import MIB

COLORS = {
    NATIVE: "#888888",
    TRIMSFS: "#1f77b4",
    RCLONE: "#ff7f0e",
    JUICEFS: "#9467bd",
    S3FS: "#2ca02c",
    GETS: "#cccccc",
}
_BARS = (
    ("cold", ((cold.COLD, WHOLE), (cold.COLD, cold.SCAN), (cold.PROFILE, WHOLE), (cold.PROFILE, cold.SCAN))),
    ("warm", ((warm.WARM, warm.READ), (warm.WARM, warm.TOUCH), (warm.WARM, warm.SCAN))),
)
_CURVES = (
    ("directory-listing", growth.DIRECTORIES, growth.LISTING, "objects in the directory"),
    ("directory-lookup", growth.DIRECTORIES, growth.LOOKUP, "objects in the directory"),
    ("directory-memory", growth.DIRECTORIES, growth.SERVER, "objects in the directory"),
    ("processes-cold", processes.PROCESSES, processes.COLD, "processes"),
    ("processes-warm", processes.PROCESSES, processes.WARM, "processes"),
    ("file-size-cold", growth.SIZES, growth.COLD, "size of the file"),
    ("file-size-warm", growth.SIZES, growth.WARM, "size of the file"),
)


def draw(results: Results, directory: Path) -> list[Path]:
    """Write what there are results for; returns the files."""
    drawn = []
    for title, measurements in _BARS:
        present = [(group, name) for group, name in measurements if results.cases(group, name)]
        if present:
            figure = Figure(figsize=(3 * len(present) + 1, 3.2), layout="constrained")
            for axes, (group, name) in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
                _bars(axes, results, group, name)
            drawn.append(_save(figure, directory / f"{title}.svg"))
    for title, group, name, label in _CURVES:
        cases = results.cases(group, name)
        if len(cases) > 1:
            figure = Figure(figsize=(5, 3.2), layout="constrained")
            _curves(figure.subplots(), results, group, name, cases, label)
            drawn.append(_save(figure, directory / f"{title}.svg"))
    return drawn


def _bars(axes: Axes, results: Results, group: str, name: str) -> None:
    case = results.cases(group, name)[-1]
    medians = {contender: results.median(group, name, case, contender) for contender in COLORS}
    bars = {contender: median for contender, median in medians.items() if median is not None}
    drawn = axes.bar(list(bars), list(bars.values()), color=[COLORS[contender] for contender in bars])
    axes.bar_label(drawn, fmt="%.3g")
    axes.set_title(f"{group}: {name}, {case}", fontsize="small")
    axes.set_ylabel("seconds (less is better)")
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Axes, results: Results, group: str, name: str, cases: Sequence[str], label: str) -> None:
    for contender, color in COLORS.items():
        medians = [(number, results.median(group, name, case, contender)) for number, case in enumerate(cases)]
        points = [(number, median) for number, median in medians if median]
        if points:
            numbers, values = zip(*points, strict=True)
            scaled = [value / MIB if name in BYTES else value for value in values]
            axes.plot(numbers, scaled, marker="o", color=color, label=contender)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("MiB" if name in BYTES else "seconds")
    axes.set_title(f"{group}: {name}", fontsize="small")
    axes.legend(fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path
