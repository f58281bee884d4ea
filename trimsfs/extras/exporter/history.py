"""What the status page plots: a sample of each mount every 10 seconds, for an hour."""

import threading
from collections import deque
from collections.abc import Mapping

from trimsfs.extras.exporter.merged_metrics import Families, total

INTERVAL_S = 10.0
SAMPLES = 360
"""How many samples are kept of each mount: an hour."""
MOST_MOUNTS = 256
PLOTTED = {
    "fetched": "trimsfs_fetch_fetched_bytes_total",
    "requests": "trimsfs_store_requests_total",
    "errors": "trimsfs_store_failed_attempts_total",
    "disk": "trimsfs_disk_used_bytes",
    "memory": "trimsfs_host_used_bytes",
    "open": "trimsfs_files_open_handles",
    "passthrough": "trimsfs_files_passthrough_opens_total",
    "cached": "trimsfs_files_cached_opens_total",
}
"""Metrics of each sample."""


class History:
    """The last samples of each mount, as ``[time, value of each of PLOTTED]``; only the time where one was silent.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._samples: dict[str, deque[list[float]]] = {}
        self._lock = threading.Lock()

    def add(self, now: float, mounts: Mapping[str, Families | None]) -> None:
        """Record what the mounts tell at a time; forget those that have been gone for an hour."""
        now = round(now, 1)
        oldest = now - SAMPLES * INTERVAL_S
        with self._lock:
            for mountpoint in list(mounts)[:MOST_MOUNTS]:
                families = mounts[mountpoint]
                values = [total(families, name) for name in PLOTTED.values()] if families is not None else []
                samples = self._samples.setdefault(mountpoint, deque(maxlen=SAMPLES))
                while samples and samples[-1][0] >= now:  # the clock was set back: a plot would go backwards
                    samples.pop()
                samples.append([now, *values])
                while samples[0][0] <= oldest:  # or it was set ahead: a plot would span the years between
                    samples.popleft()
            self._samples = {mount: kept for mount, kept in self._samples.items() if oldest < kept[-1][0] <= now}
            while len(self._samples) > MOST_MOUNTS:
                del self._samples[min(self._samples, key=lambda mount: self._samples[mount][-1][0])]

    def of(self, mountpoint: str) -> list[list[float]]:
        """The samples of a mount, the oldest first."""
        with self._lock:
            return list(self._samples.get(mountpoint, ()))
