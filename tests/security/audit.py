"""``make audit``: whether what is installed has flaws that are known, as the Python package index tells.

Exits with 0 if there is none, with 1 if there are some, and with 3 if it could not be asked, of one package or all:
pip-audit itself succeeds then.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLEAN, FLAWED, NOT_ASKED = 0, 1, 3
OURS = "trimsfs"
TIMEOUT_S = 600


def outcome(report: dict[str, Any] | None) -> tuple[int, list[str]]:
    """The exit code for what pip-audit has found, None if it has found nothing out, and what there is to say."""
    packages = [one for one in (report or {}).get("dependencies", []) if one["name"] != OURS]
    flaws = [
        f"{one['name']} {one['version']}: {flaw['id']}: fixed in {', '.join(flaw['fix_versions']) or 'no version yet'}"
        for one in packages
        for flaw in one.get("vulns", [])
    ]
    unasked = [one["name"] for one in packages if "skip_reason" in one]
    if flaws:
        return FLAWED, flaws
    if not packages or unasked:
        return NOT_ASKED, [f"could not ask about {len(unasked) or 'any'} packages: is the index reachable?"]
    return CLEAN, [f"{len(packages)} packages, no flaw that is known"]


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "report.json")
        command = [sys.executable, "-m", "pip_audit", "--local", "--progress-spinner", "off", "-f", "json"]
        command += ["-o", str(file)]
        try:
            subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
            report = json.loads(file.read_text())
        except (OSError, ValueError, subprocess.TimeoutExpired):
            report = None
    code, lines = outcome(report)
    for line in lines:
        print(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
