"""What grows: objects, mounts, cached and open files, programs that share a model, and the size of an object."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import FAILURES, Bench
from tests.benchmarks.children import Child, ChildError, begin, measure
from tests.benchmarks.data import BUCKET
from tests.benchmarks.machine import settle
from tests.benchmarks.measure.processes import PSS, WARM, map_in
from tests.benchmarks.results import TRIMSFS, Key
from tests.benchmarks.scaling.processes import watched
from tests.benchmarks.scaling.study import (
    COMMAND_LS,
    CPU,
    LS,
    MEMORY,
    MOUNT,
    OPEN,
    OPEN_CPU,
    REST_S,
    STAT,
    UMOUNT,
    Mounted,
    Study,
)
from trimsfs import mountinfo

OBJECTS, FLAT, MOUNTS = "scale: objects", "scale: objects in one directory", "scale: mounts"
CACHE, FILES = "scale: files in the cache", "scale: open files"
READERS, SIZE = "scale: programs that map a model", "scale: GB of an object"
WAKEUPS, IDLE_CPU = "wakeups a second at rest", "processor time of a second at rest"
VERIFIED, FIRST_OPEN = "mount, and every file verified by an open", "first open of a file"
DESCRIPTORS, PASSED = "descriptors of the server", "passed through / open files"
COLD_OPEN, READS = "open, not here", "first 4 KiB of it, of its middle and its end"
EACH = 1000
"""Objects in a directory, where there are many."""
TRIES = 5
AT_ONCE = 10
"""Directories that are fetched at once."""
SPARE_DESCRIPTORS = 64
"""Descriptors that a process needs besides those of the files that it holds open."""
GB = 10**9

Work = Callable[[Mounted], Sequence[float]]


def scale(bench: Bench) -> None:
    """Each of them, one after the other."""
    with watched() as processes:
        study = Study(bench, processes)
        for part in (_objects, _objects_in_one_directory, _mounts, _files, _readers, _sizes):
            try:
                part(study)
            except FAILURES as error:
                bench.results.failures.append(f"scale: {part.__name__.strip('_')}: {type(error).__name__}: {error}")


def _objects(study: Study) -> None:
    for count in study.bench.scale.objects:
        _object_names(study, OBJECTS, count, EACH)


def _objects_in_one_directory(study: Study) -> None:
    for count in study.bench.scale.objects_in_one_directory:
        _object_names(study, FLAT, count, count)


def _object_names(study: Study, group: str, count: int, each: int) -> None:
    layout = study.layout(f"{each}-of-{count}")
    study.fill(layout / "models", count, each)
    _at(study, group, count, layout, [COMMAND_LS], _command_ls, below="models")


def _readers(study: Study) -> None:
    size, timeout_s = study.bench.scale.big, study.bench.scale.growth_timeout_s
    layout = study.layout("model")
    os.link(study.bench.data.store / BUCKET / study.bench.data.file(size), layout / "model")

    def share(count: int, mount: Mounted) -> Sequence[float]:
        map_in(mount.path / "model", 1, timeout_s)
        seconds, pss, _ = map_in(mount.path / "model", count, timeout_s)
        return [seconds, pss / size]

    for count in study.bench.scale.sharers:
        _at(study, READERS, count, layout, [WARM, PSS], partial(share, count))


def _sizes(study: Study) -> None:
    def peek(mount: Mounted) -> Sequence[float]:
        outcome = measure("peek", mount.path / "object", study.bench.scale.growth_timeout_s)
        return [outcome["open"], outcome["reads"]]

    for count in study.bench.scale.object_gb:
        layout = study.layout(f"gb-{count}")
        (layout / "object").touch()
        os.truncate(layout / "object", count * GB)
        _at(study, SIZE, count, layout, [COLD_OPEN, READS], peek)


def _command_ls(mount: Mounted) -> Sequence[float]:
    begun = time.monotonic()
    mount.study.command("ls", mount.path)
    return [time.monotonic() - begun]


def _at(
    study: Study, group: str, number: int, layout: Path, names: Sequence[str], work: Work, below: str = "listed"
) -> None:
    """One point of what grows: a mount of its own over an empty cache, with all that is measured of each."""

    mounts: list[Mounted] = []

    def measured() -> Sequence[float]:
        before_s = study.processes.cpu_s()
        mount = stack.enter_context(study.mounted(layout, directory))
        mounts.append(mount)
        stat_s, ls_s = mount.names(below)
        own = work(mount)
        cpu_s = study.processes.cpu_s() - before_s
        time.sleep(REST_S)
        memory = study.processes.memory_bytes(study.bench.work)
        open_s, open_cpu_s = mount.opens()
        return [mount.seconds, stat_s, ls_s, *own, open_s, open_cpu_s, memory, cpu_s]

    every = [MOUNT, STAT, LS, *names, OPEN, OPEN_CPU, MEMORY, CPU]
    with study.bench.directory() as directory, ExitStack() as stack:
        study.bench.take(group, _case(number), TRIMSFS, every, measured)
        _unmount(study, group, number, mounts)


def _unmount(study: Study, group: str, number: int, mounts: Sequence[Mounted]) -> None:
    """Measured by itself, so that a mount that does not end costs no other measurement."""
    for mount in mounts:
        study.bench.take(group, _case(number), TRIMSFS, [UMOUNT], partial(_unmounted, mount))


def _unmounted(mount: Mounted) -> Sequence[float]:
    return [mount.unmount()]


def _mounts(study: Study) -> None:
    layout, before_s = study.layout("mounts"), study.processes.cpu_s()
    made: list[Mounted] = []
    with ExitStack() as stack:

        def more(number: int) -> Sequence[float]:
            fresh = []
            while len(made) < number:
                directory = stack.enter_context(study.bench.directory())
                made.append(stack.enter_context(study.mounted(layout, directory)))
                fresh.append(made[-1].seconds)
            stat_s, ls_s = made[-1].names("listed")
            cpu_s = study.processes.cpu_s() - before_s
            time.sleep(study.bench.scale.settle_s)
            wakeups, idle_cpu_s = _at_rest(study)
            memory = study.processes.memory_bytes(study.bench.work)
            open_s, open_cpu_s = made[-1].opens()
            return [statistics.median(fresh), stat_s, ls_s, open_s, open_cpu_s, memory, cpu_s, wakeups, idle_cpu_s]

        def fewer(number: int) -> Sequence[float]:
            gone = []
            while len(made) > number:
                gone.append(made.pop().unmount())
            return [statistics.median(gone)]

        numbers = study.bench.scale.mounts
        names = [MOUNT, STAT, LS, OPEN, OPEN_CPU, MEMORY, CPU, WAKEUPS, IDLE_CPU]
        for number in numbers:
            study.bench.take(MOUNTS, _case(number), TRIMSFS, names, partial(more, number))
        for number, left in reversed(list(zip(numbers, (0, *numbers), strict=False))):
            study.bench.take(MOUNTS, _case(number), TRIMSFS, [UMOUNT], partial(fewer, left))


def _at_rest(study: Study) -> tuple[float, float]:
    """Wakeups, and processor time, of a second."""
    seconds, wakeups, cpu_s = study.bench.scale.rest_s, study.processes.wakeups(), study.processes.cpu_s()
    time.sleep(seconds)
    return (study.processes.wakeups() - wakeups) / seconds, (study.processes.cpu_s() - cpu_s) / seconds


def _files(study: Study) -> None:
    """A cache of so many small files: a mount over it, then all of them opened and held open."""
    layout, here = study.layout("files"), 0
    with study.bench.directory() as directory:
        for number in study.bench.scale.files:
            fresh = layout / "files" / f"{number:07}"
            study.fill(fresh, number - here, EACH)
            with study.mounted(layout, directory) as mount:
                _patiently(partial(study.command, "warm", mount.resident))
                paths = [mount.path / path.relative_to(layout) for path in sorted(fresh.iterdir())]
                for first in range(0, len(paths), AT_ONCE):
                    # A server keeps files open until they are on the disk: what it has no descriptors for comes later.
                    _patiently(partial(study.command, "warm", *paths[first : first + AT_ONCE]))
                _patiently(partial(_end, mount))
            here = number
            with ExitStack() as stack:
                _cached_and_open(study, number, layout, directory, stack)


def _patiently(command: Callable[[], object]) -> None:
    """Run a command that is not measured, and that may have to be run again."""
    for left in reversed(range(TRIES)):
        try:
            command()
        except ChildError:
            if not left:
                raise
            settle()
        else:
            return


def _end(mount: Mounted) -> None:
    """Unmount, unless an attempt before has."""
    if mountinfo.trimsfs_at(mount.path) is not None:
        mount.unmount()


def _cached_and_open(study: Study, number: int, layout: Path, directory: Path, stack: ExitStack) -> None:
    mounts: list[Mounted] = []

    def cached() -> Sequence[float]:
        before_s = study.processes.cpu_s()
        mount = stack.enter_context(study.mounted(layout, directory))
        mounts.append(mount)
        cpu_s = study.processes.cpu_s() - before_s
        time.sleep(REST_S)
        memory = study.processes.memory_bytes(study.bench.work)
        stat_s, ls_s = mount.names("listed")
        open_s, open_cpu_s = mount.opens()
        return [mount.seconds, stat_s, ls_s, open_s, open_cpu_s, memory, cpu_s]

    def opened() -> Sequence[float]:
        (mount,) = mounts
        before_s = study.processes.cpu_s()
        with ExitStack() as holders:
            first = [_hold(study, mount, share, holders) for share in _shares(number)]
            cpu_s = study.processes.cpu_s() - before_s
            time.sleep(REST_S)
            memory = study.processes.memory_bytes(study.bench.work)
            stat_s, ls_s = mount.names("listed")
            open_s, open_cpu_s = mount.opens()
            metrics = mount.metrics()
        passed = metrics["trimsfs_files_passthrough_handles"] / number
        study.bench.results.add(
            Key(CACHE, VERIFIED, _case(number), TRIMSFS), mount.seconds + sum(one["seconds"] for one in first)
        )
        descriptors = metrics["trimsfs_server_open_descriptors"]
        common = [stat_s, ls_s, open_s, open_cpu_s, memory, cpu_s]
        return [first[-1]["each"], *common, descriptors, passed]

    names = [MOUNT, STAT, LS, OPEN, OPEN_CPU, MEMORY, CPU]
    study.bench.take(CACHE, _case(number), TRIMSFS, names, cached)
    names = [FIRST_OPEN, STAT, LS, OPEN, OPEN_CPU, MEMORY, CPU, DESCRIPTORS, PASSED]
    study.bench.take(FILES, _case(number), TRIMSFS, names, opened)
    _unmount(study, FILES, number, mounts)


def _shares(number: int) -> list[range]:
    """So many files, divided among processes by the descriptors that each may have."""
    each = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_DESCRIPTORS
    return [range(begin, min(begin + each, number)) for begin in range(0, number, each)]


def _hold(study: Study, mount: Mounted, share: range, holders: ExitStack) -> dict[str, float]:
    """Have a process open its share of the files, and keep them open until the context ends."""
    holder = Child("reader", "hold", mount.path / "files", skip=share.start, count=len(share))
    begin([holders.enter_context(holder)])
    outcome = holder.outcome(study.bench.scale.growth_timeout_s)
    if outcome["files"] != len(share):
        raise ValueError(f"only {outcome['files']} of {len(share)} files are there")
    return outcome


def _case(number: int) -> str:
    return f"{number:,}"
