"""A host's clock that says another time, by libfaketime: in all processes of a mount and in commands.

It emulates the clock of programs alone. The kernel's own times, as of files, stay those of this host. The monotonic
clock is not changed.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

LIBRARIES = "*/faketime/libfaketimeMT.so.1"
CACHED_S = 1
"""How long a program believes what it has read of its clock, and up to a second longer."""
NOON = 1.5 * 86_400
"""Noon of the second of January 1970 in UTC: it is that day nearly everywhere."""


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock that programs read again and again: what a *file* says is how far it is off."""

    file: Path

    def set(self, now: float) -> None:
        """Have it say a time, in seconds since the epoch, and go on from there. Returns once all programs know."""
        before = self.file.exists()
        fresh = self.file.with_suffix(".new")
        fresh.write_text(f"{int(now - time.time()):+d}\n")
        fresh.chmod(0o644)
        fresh.replace(self.file)
        if before:  # else no program has it yet
            time.sleep(CACHED_S + 1.1)

    def correct(self) -> None:
        """Have it say the right time, as `set`."""
        self.set(time.time())

    def environment(self) -> dict[str, str]:
        """The variables of programs that have this clock. Skips the test where libfaketime is not installed."""
        library = next(Path("/usr/lib").glob(LIBRARIES), None)
        if library is None:
            pytest.skip("faketime is not installed")
        return {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_CACHE_DURATION": f"{CACHED_S}",
            "FAKETIME_DISABLE_SHM": "1",  # killed servers would leave it
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
