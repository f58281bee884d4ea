"""What is in C, built for the address sanitizer."""

import os
import subprocess
from pathlib import Path

SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]


def sanitized(log: Path) -> dict[str, str]:
    """The environment of a Python that loads what is built for sanitizers, which report to ``log.PID``."""
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",  # Python leaks by design at its end
        "UBSAN_OPTIONS": f"log_path={log}",
        "PYTHONMALLOC": "malloc",
    }


def reported(directory: Path) -> str:
    return "".join(path.read_text() for path in directory.glob("sanitizer.*"))
