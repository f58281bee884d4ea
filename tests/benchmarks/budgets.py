"""What trimsfs is held to: each budget a formula over the results and a bound."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks.measure import cold, growth, processes, service, stores, warm
from tests.benchmarks.measure.references import ONE_LAST, PART, WHOLE
from tests.benchmarks.models import loads, partial_reads, starts
from tests.benchmarks.models.cases import FILE_READ, LLAMA, LLAMA_32, ONNX, RESNET, SMALL, TENSORS
from tests.benchmarks.models.places import BUSY_HTTP, BUSY_HTTPS, DISTANT, HTTPS, SLOW
from tests.benchmarks.models.ways import DOWNLOADS
from tests.benchmarks.results import GETS, JUICEFS, NATIVE, PEERS, RCLONE, RUNAI, S3FS, TRIMSFS, Key, Results
from tests.benchmarks.scale import MIB, size_text
from tests.benchmarks.scaling import growths, slopes, study

Formula = Callable[[Results], float | None]
FACTORS = {"ms": 1e3, "µs": 1e6, "MiB": 1 / MIB}
"""What numbers are multiplied by to be shown in a unit, where that is not 1."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A bound on a number: at most, or at least if *least*. Numbers are in seconds or bytes, and shown in *unit*."""

    name: str
    formula: Formula
    bound: float
    unit: str = "x"
    least: bool = False

    def word(self, value: float | None) -> str:
        """How it went, in a word or two; a number is None when it was not measured."""
        if value is None:
            return "not measured"
        return "met" if (value >= self.bound if self.least else value <= self.bound) else "missed"

    def text(self, value: float) -> str:
        """A number as it is shown."""
        return f"{value * FACTORS.get(self.unit, 1):.4g} {self.unit}".rstrip()

    @property
    def description(self) -> str:
        """What is measured."""
        return DESCRIPTIONS[self.name]

    @property
    def bound_text(self) -> str:
        """The bound as it is shown."""
        return f"{'≥' if self.least else '≤'} {self.text(self.bound)}"


def verdicts(results: Results) -> list[tuple[Budget, float | None]]:
    """Every budget with its number."""
    return [(budget, budget.formula(results)) for budget in BUDGETS]


# What is measured of trimsfs alone


def _worst(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _value(group: str, name: str) -> Formula:
    """The median of trimsfs, the largest over all cases."""
    return lambda results: _worst(results.median(group, name, of, TRIMSFS) for of in results.cases(group, name))


def _last(group: str, name: str) -> Formula:
    """The median of trimsfs in the largest case, which comes last."""
    return lambda results: _worst(results.median(group, name, of, TRIMSFS) for of in results.cases(group, name)[-1:])


def _ours(name: str, case: str, place: str) -> Formula:
    """The median of trimsfs in loads of models from a place."""
    return lambda results: results.median(loads.group(place), name, case, TRIMSFS)


# Beside others


def _ratio(results: Results, group: str, name: str, case: str, above: str, below: str) -> float | None:
    one, other = results.median(group, name, case, above), results.median(group, name, case, below)
    return one / other if one and other else None


def _times_native(name: str) -> Formula:
    """Time of trimsfs / time of the native file, warm."""
    return lambda results: _worst(
        _ratio(results, warm.WARM, name, of, TRIMSFS, NATIVE) for of in results.cases(warm.WARM, name)
    )


def _speed_of_native(results: Results) -> float | None:
    ratio = _times_native(warm.READ)(results)
    return 1 / ratio if ratio else None


def _speed_of(group: str, *others: str) -> Formula:
    """Speed of trimsfs / speed of the fastest of *others* in the whole read."""

    def formula(results: Results) -> float | None:
        ratios = [
            _ratio(results, group, WHOLE, of, other, TRIMSFS) for of in results.cases(group, WHOLE) for other in others
        ]
        return min(filter(None, ratios), default=None)

    return formula


def _first_byte(group: str, open_group: str) -> Formula:
    """Time to the first byte of the largest file, whose name is known, streamed / time of one GET of 8 MiB.

    From the group of the modes of opening if that was measured, otherwise from the ordinary cold read.
    """

    def formula(results: Results) -> float | None:
        for of_group, contender in ((open_group, cold.cold_open_name("stream")), (group, TRIMSFS)):
            cases = [key.case for key in results.series if key == Key(of_group, cold.FIRST, key.case, contender)]
            first = results.median(of_group, cold.FIRST, cases[-1], contender) if cases else None
            one = results.median(of_group, ONE_LAST, size_text(PART), GETS)
            if first and one:
                return first / one
        return None

    return formula


def _beside_s3(kind: str) -> Formula:
    """Time of a whole cold read by another kind of store / time by S3."""
    names = stores.contender_name(kind), stores.contender_name(stores.S3)
    return lambda results: _worst(
        _ratio(results, stores.STORES, WHOLE, of, *names) for of in results.cases(stores.STORES, WHOLE)
    )


# First loads of models


def _beside(name: str, cases: Sequence[str], others: Sequence[str], *places: str) -> Formula:
    """trimsfs / the least of the others, of the worst of these cases and places."""
    return lambda results: max(_ratios(results, name, cases, others, places), default=None)


def _ratios(
    results: Results, name: str, cases: Sequence[str], others: Sequence[str], places: Sequence[str]
) -> Iterator[float]:
    for group in map(loads.group, places):
        for case in cases:
            median = results.median(group, name, case, TRIMSFS)
            theirs = [least for other in others if (least := results.median(group, name, case, other))]
            if median and theirs:
                yield median / min(theirs)


def _neighbours(results: Results) -> float | None:
    """How fast programs compute beside trimsfs / beside s3fs, of the worst of what is loaded on a busy host."""
    return min(_ratios(results, loads.RATE, (FILE_READ, LLAMA), (S3FS,), _BUSY), default=None)


def _header_beside_one_get(results: Results) -> float | None:
    """From the worse of near and distant: time of a shard's header / time of one GET of as many bytes."""
    name, places = partial_reads.WHOLE_HEADER, (HTTPS, DISTANT)
    cases = [case for place in places for case in results.cases(loads.group(place), name)]
    return _beside(name, cases, (GETS,), *places)(results)


def _beside_the_wire(results: Results) -> float | None:
    """From afar: time of the first load and inference, less that of an inference with everything in memory, / time of
    the bytes on the wire."""
    cold_s = _ours(loads.SUM, LLAMA, DISTANT)(results)
    inferring_s = results.median(loads.group(HTTPS), loads.INFER, LLAMA, NATIVE)
    wire_s = results.median(loads.group(DISTANT), partial_reads.WIRE, LLAMA, GETS)
    return (cold_s - inferring_s) / wire_s if cold_s and inferring_s and wire_s else None


# Starts of programs


def _start(name: str, case: str, way: str, base: str = starts.PYTHON) -> Formula:
    """A way of starting a program / another one."""
    return lambda results: _ratio(results, starts.STARTS, name, case, way, base)


def _memory_of_spawned(results: Results) -> float | None:
    return results.median(starts.STARTS, starts.PRIVATE, LLAMA, starts.SPAWN)


def _start_of_run(results: Results) -> float | None:
    """What `trimsfs run` adds to the start of a program that does nothing."""
    run, plain = (results.median(starts.STARTS, starts.CPU, starts.EMPTY, way) for way in (starts.RUN, starts.PYTHON))
    return run - plain if run and plain else None


_BUSY = (BUSY_HTTPS, BUSY_HTTP)
_LLAMAS = (LLAMA, LLAMA_32)
_SAME_FAR = "the same, 25 ms and 90 MB/s for each connection"
_SUM, _CPU = loads.SUM, loads.CPU

BUDGETS = (
    Budget("warm mapping, pages entered", _times_native(warm.TOUCH), 1.05),
    Budget("warm mapping, bytes read", _times_native(warm.SCAN), 1.05),
    Budget("warm read", _speed_of_native, 0.95, least=True),
    Budget("warm open", _value(warm.WARM, warm.OPEN + warm.P50), 70e-6, "µs"),
    Budget("open during a fetch", _value(service.BUSY, f"{service.RESIDENT}, p99"), 5e-3, "ms"),
    Budget("cold load", _speed_of(cold.COLD, GETS), 0.85, least=True),
    Budget("cold load, distant", _speed_of(cold.PROFILE, GETS), 0.85, least=True),
    Budget("cold load beside others", _speed_of(cold.COLD, *PEERS), 1.5, least=True),
    Budget("cold load beside others, distant", _speed_of(cold.PROFILE, *PEERS), 1.5, least=True),
    Budget("gs:// beside s3://", _beside_s3(stores.GOOGLE), 1.1),
    Budget("az:// beside s3://", _beside_s3(stores.AZURE), 1.1),
    Budget("hf:// beside s3://", _beside_s3(stores.HUB), 1.1),
    Budget("oci:// beside s3://", _beside_s3(stores.REGISTRY), 1.1),
    Budget("first byte", _first_byte(cold.COLD, cold.COLD_OPEN), 1.2),
    Budget("first byte, distant", _first_byte(cold.PROFILE, cold.COLD_OPEN_PROFILE), 1.2),
    Budget("fetched once", _value(processes.PROCESSES, processes.FETCHED), 1.0),
    Budget("one copy in memory", _last(processes.PROCESSES, processes.IN_MEMORY), 1.02),
    Budget("server memory", _value(service.COST, service.PEAK), 200 * MIB, "MiB"),
    Budget("large directory, listed", _last(growth.DIRECTORIES, growth.LISTING), 10, "s"),
    Budget("large directory, looked up", _last(growth.DIRECTORIES, growth.LOOKUP), 100e-6, "µs"),
    Budget("model, beside downloads", _beside(_SUM, _LLAMAS, DOWNLOADS, HTTPS), 0.75),
    Budget("model, beside s3fs", _beside(_SUM, _LLAMAS, (S3FS,), HTTPS), 0.8),
    Budget("model, beside other mounts", _beside(_SUM, _LLAMAS, (RCLONE, JUICEFS), HTTPS), 0.7),
    Budget("model, processor time", _beside(_CPU, _LLAMAS, DOWNLOADS, HTTPS), 1.2),
    Budget("model, busy, beside downloads", _beside(_SUM, (LLAMA,), DOWNLOADS, *_BUSY), 0.65),
    Budget("model, busy, beside s3fs", _beside(_SUM, (LLAMA,), (S3FS,), *_BUSY), 0.75),
    Budget("model, distant, beside downloads", _beside(_SUM, (LLAMA,), DOWNLOADS, DISTANT), 0.8),
    Budget("model, distant, beside other mounts", _beside(_SUM, (LLAMA,), PEERS, DISTANT), 0.7),
    Budget("model, distant, beside the wire", _beside_the_wire, 1.1),
    Budget("tensors, beside Run:ai's streamer", _beside(_SUM, (TENSORS,), (RUNAI,), HTTPS), 0.6),
    Budget("one file, beside other mounts", _beside(_SUM, (FILE_READ,), PEERS, HTTPS), 0.8),
    Budget("one file, distant, beside other mounts", _beside(_SUM, (FILE_READ,), PEERS, DISTANT), 0.67),
    Budget("one file, processor time", _ours(loads.CPU_PER_GIB, FILE_READ, HTTPS), 1.5, "s"),
    Budget("one file, busy, beside other mounts", _beside(_SUM, (FILE_READ,), PEERS, *_BUSY), 1.0),
    Budget("what computes meanwhile", _neighbours, 1.0, least=True),
    Budget("header, beside one GET", _header_beside_one_get, 1.5),
    Budget("first bytes over a slow link", _last(loads.group(SLOW), partial_reads.BESIDE), 0.6, "s"),
    Budget("small files, cold", _beside(_SUM, (SMALL,), PEERS, HTTPS), 0.7),
    Budget("small files, warm", _beside(loads.WARM, (SMALL,), PEERS, HTTPS), 0.2),
    Budget("growth", slopes.steepest, 1.1, ""),
    Budget("open of a resident file among many", slopes.last_by_first(growths.OBJECTS, study.OPEN), 1.2),
    Budget("memory for a million names", slopes.at(growths.OBJECTS, study.MEMORY, 1_000_000), 300 * MIB, "MiB"),
    Budget("trimsfs ls of 100,000 files", slopes.at(growths.OBJECTS, study.COMMAND_LS, 100_000), 5, "s"),
    Budget("trimsfs umount after a million names", slopes.at(growths.OBJECTS, study.UMOUNT, 1_000_000), 2, "s"),
    Budget("trimsfs mount", slopes.at(growths.MOUNTS, study.MOUNT, 1), 0.3, "ms"),
    Budget("memory of a mount at rest", slopes.at(growths.MOUNTS, study.MEMORY, 1), 60 * MIB, "MiB"),
    Budget("memory of 20 mounts at rest", slopes.at(growths.MOUNTS, study.MEMORY, 20), 600 * MIB, "MiB"),
    Budget("wakeups of a mount at rest", slopes.at(growths.MOUNTS, growths.WAKEUPS, 1), 2, ""),
    Budget("spawned Llama", _start(starts.CPU, LLAMA, starts.SPAWN), 1 / 6),
    Budget("spawned Llama, to the output", _start(starts.FIRST, LLAMA, starts.SPAWN), 1 / 6),
    Budget("spawned ResNet-50", _start(starts.CPU, RESNET, starts.RESIDENT), 1 / 4),
    Budget("spawned ResNet-50, to the output", _start(starts.FIRST, RESNET, starts.RESIDENT), 1 / 4),
    Budget("spawned ONNX session", _start(starts.CPU, ONNX, starts.RESIDENT), 1 / 2),
    Budget("spawned ONNX session, to the output", _start(starts.FIRST, ONNX, starts.RESIDENT), 1 / 2),
    Budget("memory of a spawned Llama", _memory_of_spawned, 30e6, "MiB"),
    Budget("eight spawned Llamas", _start(starts.TOGETHER, LLAMA, starts.RESIDENT, starts.INFERENCES), 1.2),
    Budget("start of trimsfs run", _start_of_run, 28.5e-3, "ms"),
)
DESCRIPTIONS = {
    "warm mapping, pages entered": "time / native time to map the open file and enter every page",
    "warm mapping, bytes read": "time / native time to map the file and read every byte",
    "warm read": "speed / native speed of reads of 1 MiB",
    "warm open": "median of open and close, one after the other",
    "open during a fetch": "99 % of opens of a resident file take at most this while another is fetched",
    "cold load": "speed / speed of plain GETs by 4 or 8 processes",
    "cold load, distant": _SAME_FAR,
    "cold load beside others": "speed / speed of the fastest other mount",
    "cold load beside others, distant": _SAME_FAR,
    "gs:// beside s3://": "time of a cold load / time by S3, 25 ms and 90 MB/s for each connection",
    "az:// beside s3://": "the same of Azure",
    "hf:// beside s3://": "the same of a Hugging Face hub",
    "oci:// beside s3://": "the same of an OCI registry",
    "first byte": "time to the first byte of a streamed file / time of one GET of 8 MiB",
    "first byte, distant": _SAME_FAR,
    "fetched once": "bytes fetched / bytes of the file, whatever the number of processes",
    "one copy in memory": "page cache of file and cache directory / bytes of the file, with the most processes",
    "server memory": "peak PSS of the server's processes during a fetch, without cached files they map",
    "large directory, listed": "list and stat all objects of the largest directory",
    "large directory, looked up": "one lookup in the largest directory, by a kernel that has forgotten the name",
    "model, beside downloads": "first load and inference of the Llama, https: time / time with the fastest "
    "download before it",
    "model, beside s3fs": "the same: time / time with s3fs",
    "model, beside other mounts": "the same: time / time with the fastest other mount, without s3fs",
    "model, processor time": "of the whole machine for it / with the cheapest download before it",
    "model, busy, beside downloads": "the Llama on a host that computes, https and http: time / time with the fastest "
    "download",
    "model, busy, beside s3fs": "the same: time / time with s3fs",
    "model, distant, beside downloads": "the Llama at 25 ms and 90 MB/s for each connection: time / time with the "
    "fastest download",
    "model, distant, beside other mounts": "the same: time / time with the fastest other mount",
    "model, distant, beside the wire": "that time, less an inference from memory / time of the bytes on the wire",
    "tensors, beside Run:ai's streamer": "all tensors of the Llama in private memory, https: time / time by the "
    "streamer",
    "one file, beside other mounts": "read for the first time, https: time / time with the fastest other mount",
    "one file, distant, beside other mounts": "the same at 25 ms and 90 MB/s for each connection",
    "one file, processor time": "of the machine without the server's, for a GiB, https",
    "one file, busy, beside other mounts": "on a host that computes, https and http: time / time with the fastest "
    "other mount",
    "what computes meanwhile": "how fast it does beside trimsfs / beside s3fs, one file and Llama, https and http",
    "header, beside one GET": "of a shard, near and distant: time / time of one GET of as many bytes",
    "first bytes over a slow link": "of a shard, while the rest of its model is fetched, 25 ms and 25 MB/s in all",
    "small files, cold": "300 files by name, one after the other, https: time / time of the fastest other mount",
    "small files, warm": "the same again",
    "growth": "the largest exponent of anything in the groups scale",
    "open of a resident file among many": "time with the most objects / with the fewest",
    "memory for a million names": "PSS of all processes of the mount once all are listed",
    "trimsfs ls of 100,000 files": "of directories of 1,000",
    "trimsfs umount after a million names": "until its processes have ended",
    "trimsfs mount": "the command, of one mount",
    "memory of a mount at rest": "PSS of all its processes",
    "memory of 20 mounts at rest": "PSS of all their processes",
    "wakeups of a mount at rest": "a second, of all its processes",
    "spawned Llama": "processor time from exec to the first output / of plain python; its imports are preloaded",
    "spawned Llama, to the output": "the same: time / time",
    "spawned ResNet-50": "processor time, MXNet, / of plain python; a preloaded module has the model",
    "spawned ResNet-50, to the output": "the same: time / time",
    "spawned ONNX session": "processor time / of plain python; a preloaded module has the session",
    "spawned ONNX session, to the output": "the same: time / time",
    "memory of a spawned Llama": "what it has written, and no other process has",
    "eight spawned Llamas": "to the last output, two processors / eight inferences of loaded models; model preloaded",
    "start of trimsfs run": "processor time of a program that does nothing, less that of plain python",
}
"""What each measures, by its name."""
