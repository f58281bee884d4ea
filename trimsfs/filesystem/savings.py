"""What sharing saves: the memory that programs would take in addition if each had a copy of what it has open."""

from collections.abc import Callable, Iterable

from trimsfs.filesystem.handles import OpenFile
from trimsfs.processes import process_of
from trimsfs.telemetry.model_counters import model_of
from trimsfs.tiers.blob import Blob

MOST_LOOKS = 256
"""Threads whose processes are looked up at a time, each in some 20 us; any other counts as a process of its own."""


def saved_bytes(files: Iterable[OpenFile], resident: Callable[[Blob], bool]) -> dict[str, int]:
    """The bytes saved of each model: those of its resident files, times the processes that have them open, less one.

    A file that was open before this server started counts as one more process for each time that it is open.
    """
    threads: dict[Blob, list[int]] = {}
    for file in files:
        if file.blob.handles > 1:
            threads.setdefault(file.blob, []).append(file.thread)
    processes: dict[int, int] = {}
    saved: dict[str, int] = {}
    for blob, openers in threads.items():
        if not resident(blob):
            continue
        for thread in openers:
            if thread and thread not in processes:
                processes[thread] = process_of(thread) if len(processes) < MOST_LOOKS else thread
        count = openers.count(0) + len({processes[thread] for thread in openers if thread})
        model = model_of(blob.generation.key)
        saved[model] = saved.get(model, 0) + (count - 1) * blob.generation.size
    return saved
