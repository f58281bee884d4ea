"""The rules and the dashboard of packaging/observability, and what they ask for."""

import json
import re
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[2] / "packaging/observability"


def targets() -> list[dict[str, Any]]:
    """What the dashboard draws: a query in ``expr``, and the name of each of its series in ``legendFormat``."""
    panels = json.loads((DIRECTORY / "dashboard.json").read_text())["panels"]
    return [target for panel in panels for target in panel.get("targets", [])]


def queries() -> list[str]:
    """The queries of the dashboard."""
    return [target["expr"] for target in targets()]


def metrics(expression: str) -> list[str]:
    """The metrics in an expression that servers and the exporter tell, not those of recording rules."""
    return re.findall(r"(?<![:\w])(?:trimsfs_\w+|up)\b(?!:)", expression)
