"""Many clients, each with its next request as soon as the last is answered; models by a Pareto popularity."""

import random
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.evaluation.results import IDEAL, NATIVE, SHARED, Batch, Results
from tests.evaluation.runtime import RequestError, Zygote
from tests.evaluation.setting import Model, Setting
from tests.support.mounts import trimsfs

SEED = 2019
SAMPLE_S = 0.05


def clients(
    setting: Setting,
    models: Sequence[Model],
    results: Results,
    *,
    shares: Sequence[float],
    counts: Sequence[int],
    requests: int,
) -> None:
    """Measure batches of *requests* of so many clients at once over a share of the models, each in three ways.

    All is warm: files are in the page cache, models on the host. Each way gets the same requests in the same order.
    """
    for model in models:
        setting.write(model)
    with ExitStack() as stack:
        mount = stack.enter_context(setting.mounted())
        warmed = trimsfs("warm", mount.path, timeout_s=600)
        if warmed.returncode:
            raise RuntimeError(warmed.stderr.strip())
        ways = {
            NATIVE: (stack.enter_context(setting.zygote(shared=False)), setting.store, False),
            SHARED: (stack.enter_context(setting.zygote(shared=True)), mount.path, False),
            IDEAL: (stack.enter_context(setting.zygote(shared=True)), setting.store, True),
        }
        for model in models:  # the first request for a model is not like the others in any of the ways
            for running, root, ideal in ways.values():
                running.ask(root / model.name, model.input_shape, ideal=ideal)
        for share in shares:
            for count in counts:
                drawn = draw(models, share, requests)
                for way, (running, root, ideal) in ways.items():
                    batch = Batch(way=way, share=share, clients=count)
                    _run(batch, results.failures, running, root, drawn, ideal=ideal)
                    results.batches.append(batch)
                    label = f"{share:.0%} of the models, {count} clients: {way}: {batch.wall_s:.1f} s"
                    setting.console.print(f"[dim]{label}[/dim]", highlight=False)


def draw(models: Sequence[Model], share: float, requests: int) -> list[Model]:
    """So many requests for a share of the models: a model's rank is drawn from Pareto(1, 1)."""
    source = random.Random(SEED)
    some = source.sample(list(models), max(1, round(share * len(models))))
    drawn: list[Model] = []
    while len(drawn) < requests:
        rank = int(source.paretovariate(1)) - 1
        if rank < len(some):
            drawn.append(some[rank])
    return drawn


def _run(
    batch: Batch, failures: list[str], running: Zygote, root: Path, drawn: Sequence[Model], *, ideal: bool
) -> None:
    """Have a batch answered, and fill in what was measured."""
    lock, left = threading.Lock(), iter(drawn)
    ended = threading.Event()

    def client() -> None:
        while True:
            with lock:
                model = next(left, None)
            if model is None:
                return
            began = time.perf_counter()
            try:
                answer = running.ask(root / model.name, model.input_shape, ideal=ideal)
            except RequestError as error:
                failures.append(str(error))
                return
            took = time.perf_counter() - began
            with lock:
                batch.latencies.setdefault(model.name, []).append(took)
                outputs = batch.outputs.setdefault(model.name, [])
                if answer.output not in outputs:
                    outputs.append(answer.output)

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            batch.private_bytes = max(batch.private_bytes, _anonymous_bytes(running.pid))

    threads = [threading.Thread(target=client) for _ in range(batch.clients)]
    sampler = threading.Thread(target=sample)
    began = time.perf_counter()
    for thread in (sampler, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    batch.wall_s = time.perf_counter() - began
    ended.set()
    sampler.join()


def _anonymous_bytes(pid: int) -> int:
    """Memory of a zygote's children that is neither a file's nor the zygote's; counters cost nothing to read."""
    own = _anonymous(pid)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(max(0, _anonymous(int(child)) - own) for child in children)


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
