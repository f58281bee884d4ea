"""What trimsfs is held to: each budget a formula over the results and a bound."""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.benchmarks.budget import Budget, Formula
from tests.benchmarks.measure import cold, growth, processes, service, stores, warm
from tests.benchmarks.measure.references import ONE_LAST, PART, WHOLE
from tests.benchmarks.models.bounds import MODELS
from tests.benchmarks.results import GETS, NATIVE, PEERS, TRIMSFS, Key, Results
from tests.benchmarks.scale import MIB, size_text
from tests.benchmarks.scaling import growths, slopes, study


@dataclass(frozen=True, slots=True)
class Verdict:
    """A budget and its number; None when it was not measured."""

    budget: Budget
    value: float | None

    @property
    def word(self) -> str:
        """How it went, in a word or two."""
        if self.value is None:
            return "not measured"
        return "met" if self.budget.met(self.value) else "missed"


def verdicts(results: Results) -> list[Verdict]:
    """Every budget with its number."""
    return [Verdict(budget, budget.formula(results)) for budget in BUDGETS]


def _worst(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _value(group: str, name: str) -> Formula:
    """The median of trimsfs, the largest over all cases."""
    return lambda results: _worst(results.median(group, name, of, TRIMSFS) for of in results.cases(group, name))


def _last(group: str, name: str) -> Formula:
    """The median of trimsfs in the largest case, which comes last."""

    def formula(results: Results) -> float | None:
        cases = results.cases(group, name)
        return results.median(group, name, cases[-1], TRIMSFS) if cases else None

    return formula


def _times_native(name: str) -> Formula:
    """Time of trimsfs / time of the native file, warm."""

    def formula(results: Results) -> float | None:
        ratios = [_ratio(results, warm.WARM, name, of, TRIMSFS, NATIVE) for of in results.cases(warm.WARM, name)]
        return _worst(ratios)

    return formula


def _speed_of_native(results: Results) -> float | None:
    ratio = _times_native(warm.READ)(results)
    return 1 / ratio if ratio else None


def _speed_of(group: str, *others: str) -> Formula:
    """Speed of trimsfs / speed of the fastest of *others* in the whole read."""

    def formula(results: Results) -> float | None:
        ratios = [
            ratio
            for of in results.cases(group, WHOLE)
            for other in others
            if (ratio := _ratio(results, group, WHOLE, of, other, TRIMSFS))
        ]
        return min(ratios, default=None)

    return formula


def _first_byte(group: str, open_group: str) -> Formula:
    """Time to the first byte of the largest file, whose name is known, streamed / time of one GET of 8 MiB.

    From the group of the modes of opening where this trimsfs has them, otherwise from the ordinary cold read.
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

    def formula(results: Results) -> float | None:
        names = stores.contender_name(kind), stores.contender_name(stores.S3)
        return _worst(_ratio(results, stores.STORES, WHOLE, of, *names) for of in results.cases(stores.STORES, WHOLE))

    return formula


def _ratio(results: Results, group: str, name: str, case: str, above: str, below: str) -> float | None:
    one, other = results.median(group, name, case, above), results.median(group, name, case, below)
    return one / other if one and other else None


BUDGETS = (
    Budget(
        name="warm mapping, pages entered",
        description="time / native time to map the open file and enter every page",
        formula=_times_native(warm.TOUCH),
        bound=1.05,
    ),
    Budget(
        name="warm mapping, bytes read",
        description="time / native time to map the file and read every byte",
        formula=_times_native(warm.SCAN),
        bound=1.05,
    ),
    Budget(
        name="warm read",
        description="speed / native speed of reads of 1 MiB",
        formula=_speed_of_native,
        bound=0.95,
        least=True,
    ),
    Budget(
        name="warm open",
        description="median of open and close, one after the other",
        formula=_value(warm.WARM, warm.OPEN + warm.P50),
        bound=70e-6,
        unit="µs",
        factor=1e6,
    ),
    Budget(
        name="open during a fetch",
        description="99 % of opens of a resident file take at most this while another is fetched",
        formula=_value(service.BUSY, f"{service.RESIDENT}, p99"),
        bound=5e-3,
        unit="ms",
        factor=1e3,
    ),
    Budget(
        name="cold load",
        description="speed / speed of plain GETs by 4 or 8 processes",
        formula=_speed_of(cold.COLD, GETS),
        bound=0.85,
        least=True,
    ),
    Budget(
        name="cold load, distant",
        description="the same, 25 ms and 90 MB/s for each connection",
        formula=_speed_of(cold.PROFILE, GETS),
        bound=0.85,
        least=True,
    ),
    Budget(
        name="cold load beside others",
        description="speed / speed of the fastest other mount",
        formula=_speed_of(cold.COLD, *PEERS),
        bound=1.5,
        least=True,
    ),
    Budget(
        name="cold load beside others, distant",
        description="the same, 25 ms and 90 MB/s for each connection",
        formula=_speed_of(cold.PROFILE, *PEERS),
        bound=1.5,
        least=True,
    ),
    Budget(
        name="gs:// beside s3://",
        description="time of a cold load / time by S3, 25 ms and 90 MB/s for each connection",
        formula=_beside_s3(stores.GOOGLE),
        bound=1.1,
    ),
    Budget(
        name="az:// beside s3://",
        description="the same of Azure",
        formula=_beside_s3(stores.AZURE),
        bound=1.1,
    ),
    Budget(
        name="hf:// beside s3://",
        description="the same of a Hugging Face hub",
        formula=_beside_s3(stores.HUB),
        bound=1.1,
    ),
    Budget(
        name="oci:// beside s3://",
        description="the same of an OCI registry",
        formula=_beside_s3(stores.REGISTRY),
        bound=1.1,
    ),
    Budget(
        name="first byte",
        description="time to the first byte of a streamed file / time of one GET of 8 MiB",
        formula=_first_byte(cold.COLD, cold.COLD_OPEN),
        bound=1.2,
    ),
    Budget(
        name="first byte, distant",
        description="the same, 25 ms and 90 MB/s for each connection",
        formula=_first_byte(cold.PROFILE, cold.COLD_OPEN_PROFILE),
        bound=1.2,
    ),
    Budget(
        name="fetched once",
        description="bytes fetched / bytes of the file, whatever the number of processes",
        formula=_value(processes.PROCESSES, processes.FETCHED),
        bound=1.0,
    ),
    Budget(
        name="one copy in memory",
        description="page cache of file and cache directory / bytes of the file, with the most processes",
        formula=_last(processes.PROCESSES, processes.IN_MEMORY),
        bound=1.02,
    ),
    Budget(
        name="server memory",
        description="peak PSS of the server's processes during a fetch, without cached files they map",
        formula=_value(service.COST, service.PEAK),
        bound=200 * MIB,
        unit="MiB",
        factor=1 / MIB,
    ),
    Budget(
        name="large directory, listed",
        description="list and stat all objects of the largest directory",
        formula=_last(growth.DIRECTORIES, growth.LISTING),
        bound=10,
        unit="s",
    ),
    Budget(
        name="large directory, looked up",
        description="one lookup in the largest directory, by a kernel that has forgotten the name",
        formula=_last(growth.DIRECTORIES, growth.LOOKUP),
        bound=100e-6,
        unit="µs",
        factor=1e6,
    ),
    *MODELS,
    Budget(
        name="growth",
        description="the largest exponent of anything in the groups scale",
        formula=slopes.steepest,
        bound=1.1,
        unit="",
    ),
    Budget(
        name="open of a resident file among many",
        description="time with the most objects / with the fewest",
        formula=slopes.last_by_first(growths.OBJECTS, study.OPEN),
        bound=1.2,
    ),
    Budget(
        name="memory for a million names",
        description="PSS of all processes of the mount once all are listed",
        formula=slopes.at(growths.OBJECTS, study.MEMORY, 1_000_000),
        bound=300 * MIB,
        unit="MiB",
        factor=1 / MIB,
    ),
    Budget(
        name="trimsfs ls of 100,000 files",
        description="of directories of 1,000",
        formula=slopes.at(growths.OBJECTS, study.COMMAND_LS, 100_000),
        bound=5,
        unit="s",
    ),
    Budget(
        name="trimsfs umount after a million names",
        description="until its processes have ended",
        formula=slopes.at(growths.OBJECTS, study.UMOUNT, 1_000_000),
        bound=2,
        unit="s",
    ),
    Budget(
        name="trimsfs mount",
        description="the command, of one mount",
        formula=slopes.at(growths.MOUNTS, study.MOUNT, 1),
        bound=0.3,
        unit="ms",
        factor=1e3,
    ),
    Budget(
        name="memory of a mount at rest",
        description="PSS of all its processes",
        formula=slopes.at(growths.MOUNTS, study.MEMORY, 1),
        bound=60 * MIB,
        unit="MiB",
        factor=1 / MIB,
    ),
    Budget(
        name="memory of 20 mounts at rest",
        description="PSS of all their processes",
        formula=slopes.at(growths.MOUNTS, study.MEMORY, 20),
        bound=600 * MIB,
        unit="MiB",
        factor=1 / MIB,
    ),
    Budget(
        name="wakeups of a mount at rest",
        description="a second, of all its processes",
        formula=slopes.at(growths.MOUNTS, growths.WAKEUPS, 1),
        bound=2,
        unit="",
    ),
)
