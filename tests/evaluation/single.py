"""A process started for each request, one at a time: what loading costs, from each place that a model can be in."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.benchmarks.data import chill, heat
from tests.evaluation.results import IDEAL, PLACES, Request, Results
from tests.evaluation.runtime import Answer, RequestError
from tests.evaluation.setting import BUCKET, FILES, Model, Setting
from tests.support.mounts import MountedStore, trimsfs

Ask = Callable[[], tuple[Answer, float]]
"""One request: its answer, and the seconds that were needed before it."""
ALIKE = ("native warm", "host", IDEAL)
"""Places whose times are near each other: they take turns, as the machine is not equally fast at all times."""
ROUNDS = 2


def single(setting: Setting, models: list[Model], results: Results, *, repeat: int) -> None:
    """Measure every model from every place, large ones written for it and removed.

    Those that differ little are measured more often than others.
    """
    for model in models:
        local = setting.write(model)
        with setting.mounted() as mount:
            asks = _requests(setting, model, local, mount)
            for place in _turns(model, repeat):
                _measure(setting, results, model, place, asks[place])
        if model.large:
            setting.remove(model)


def _turns(model: Model, repeat: int) -> list[str]:
    """Places in the order of measuring. Large models are not all in memory at once: theirs take no turns."""
    if model.large:
        return [place for place in PLACES for _ in range(ROUNDS if place in ALIKE else 1)]
    others = [place for place in PLACES if place not in ALIKE for _ in range(repeat)]
    return [*others, *(ALIKE * ROUNDS * repeat)]


def _requests(setting: Setting, model: Model, local: Path, mount: MountedStore) -> dict[str, Ask]:
    """A request from each place, in an order in which each finds what it needs: see `PLACES`."""
    there = mount.path / model.name
    plain = partial(setting.ask, shape=model.input_shape, shared=False)
    shared = partial(setting.ask, shape=model.input_shape, shared=True)

    def download() -> tuple[Answer, float]:
        target = setting.work / "downloaded"
        target.mkdir(exist_ok=True)
        heat(local / "params")  # the endpoint reads it
        client = setting.server.client()
        try:
            client.head_bucket(Bucket=BUCKET)  # it is connected, as a mount is
            began = time.perf_counter()
            for name in FILES:
                client.download_file(BUCKET, f"{model.name}/{name}", str(target / name))
            before_s = time.perf_counter() - began
            return plain(target), before_s
        finally:
            client.close()
            shutil.rmtree(target)

    def cold() -> tuple[Answer, float]:
        heat(local / "params")
        done = trimsfs("evict", *(there / name for name in FILES))
        if done.returncode:
            raise RequestError(done.stderr.strip())
        return shared(there), 0.0

    def native(prepare: Callable[[Path], None]) -> tuple[Answer, float]:
        for name in FILES:
            prepare(local / name)
        return plain(local, memory=prepare is heat), 0.0

    def disk() -> tuple[Answer, float]:
        for blob in (mount.cache / "blobs").rglob("*"):
            if blob.is_file():
                chill(blob)
        return shared(there), 0.0

    def warm(directory: Path, *, ideal: bool = False) -> tuple[Answer, float]:
        for name in FILES:
            heat(directory / name)
        return shared(directory, ideal=ideal, memory=True), 0.0

    requests: dict[str, Ask] = {
        "native download": download,
        "native disk": lambda: native(chill),
        "native warm": lambda: native(heat),
        "cold": cold,
        "disk": disk,
        "host": lambda: warm(there),
        IDEAL: lambda: warm(local, ideal=True),
    }
    assert list(requests) == list(PLACES)
    return requests


def _measure(setting: Setting, results: Results, model: Model, place: str, ask: Ask) -> None:
    try:
        answer, before_s = ask()
    except RequestError as error:
        results.failures.append(f"{model.name}: {place}: {error}")
        return
    request = Request(model=model.name, place=place, before_s=before_s, answer=answer)
    results.requests.append(request)
    setting.console.print(f"[dim]{model.name}: {place}: {1e3 * request.total_s:.1f} ms[/dim]", highlight=False)
