"""The table of engines in docs/frameworks.md."""

from collections.abc import Sequence

from tests.engines.engines import ENGINE_ROWS
from tests.engines.matrix import Row

HEAD = """\
| engine | model, MB | mapped | copied | cold / local | warm / local | why copied |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
"""


def markdown(rows: Sequence[Row]) -> str:
    """Sizes in MB; times as ratios to a local file that is in memory."""
    known = {engine.name: engine for engine in ENGINE_ROWS}
    lines = []
    for row in rows:
        engine = known[row.engine]
        lines.append(
            f"| {engine.title} | {row.size / 1e6:.0f} | {row.mapped / 1e6:.0f} | {row.copied / 1e6:.0f} | "
            f"{row.cold_s / row.local_s:.1f} | {row.warm_s / row.local_s:.2f} | {engine.copies} |"
        )
    return HEAD + "\n".join(lines) + "\n"
