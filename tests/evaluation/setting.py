"""What every part of the evaluation works with: models in a bucket of a fast endpoint, mounts, zygotes."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tests.evaluation.runtime import Answer, Zygote, zygote
from tests.services.fast import FastS3
from tests.support.mounts import MountedStore, mounted

BUCKET = "models"
FILES = ("params", "symbol.json")
BUILD_S = 600
ZOO = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A network: bytes of its parameters as the zoo works them out, and the shape of one input."""

    name: str
    nbytes: int
    input_shape: tuple[int, ...]
    large: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """One run. Models are written to ``store``, which *server* serves as a bucket and plain MXNet loads from."""

    python: str
    work: Path
    server: FastS3
    console: Console

    @property
    def store(self) -> Path:
        return self.work / "store" / BUCKET

    def models(self) -> list[Model]:
        """The zoo's networks, in the paper's order."""
        entries = [json.loads(line) for line in self._zoo("--list").splitlines()]
        return [
            Model(name=each["name"], nbytes=each["bytes"], input_shape=tuple(each["input_shape"]), large=each["large"])
            for each in entries
        ]

    def write(self, model: Model) -> Path:
        """Write a model unless it is there; its directory."""
        directory = self.store / model.name
        if not all((directory / name).exists() for name in FILES):
            self.console.print(f"[dim]writing {model.name}: {model.nbytes >> 20} MiB[/dim]", highlight=False)
            self._zoo(model.name, str(directory))
        return directory

    def remove(self, model: Model) -> None:
        """Give the space of a model back."""
        for name in FILES:
            (self.store / model.name / name).unlink(missing_ok=True)

    def _zoo(self, *arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ZOO)}
        command = [self.python, "-W", "ignore", "-m", "zoo", *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=BUILD_S, check=False, cwd=self.work
        )
        if done.returncode:
            raise RuntimeError(f"zoo {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout

    @contextmanager
    def mounted(self, *options: str) -> Iterator[MountedStore]:
        """The bucket, mounted over an empty cache, which is removed at the end."""
        with ExitStack() as stack:
            scratch = tempfile.TemporaryDirectory(prefix="mount-", dir=self.work, ignore_cleanup_errors=True)
            directory = Path(stack.enter_context(scratch))
            yield stack.enter_context(
                mounted(f"s3://{BUCKET}", directory, *options, environment=self.server.environment())
            )

    @contextmanager
    def zygote(self, *, shared: bool) -> Iterator[Zygote]:
        """A process that answers requests, under ``trimsfs run`` or not."""
        with zygote(self.python, self.work / "zygote.log", shared=shared) as running:
            yield running

    def ask(
        self, directory: Path, shape: tuple[int, ...], *, shared: bool, ideal: bool = False, memory: bool = False
    ) -> Answer:
        """Have a process that is started for it, and has imported MXNet, answer a request. Raises RequestError."""
        with zygote(self.python, self.work / "zygote.log", shared=shared, once=True) as running:
            return running.ask(directory, shape, ideal=ideal, memory=memory)
