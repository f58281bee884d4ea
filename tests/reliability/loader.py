"""A program that loads models of several kinds from a mount, one after the other, and compares every byte."""

import io
import json
import mmap
import os
import random
import time
from pathlib import Path

from tests.support.readers import Report

MIB = 1 << 20
SHARD = 5 * MIB // 4
"""Bytes of a large file: small ones, which come ahead in another way, have up to 1 MiB."""
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{number:05}-of-00006.safetensors" for number in range(1, 7)]
UNNUMBERED = ["d", "b", "e", "a", "c"]
NUMBERED_MODELS = [f"numbered-{number}" for number in range(14)]
UNNUMBERED_MODELS = [f"plain-{number}" for number in range(6)]
SMALL_MODEL, SMALL_FILES = "small", 60
MOST_PAUSE_S = 0.1
"""Programs convert what they have read before they open the next file."""


def models_in(bucket: Path) -> None:
    """Fill a bucket with models whose order is told by an index, by the last load, and by nothing but a listing."""
    draw = random.Random(1)
    files = {f"{model}/{name}": SHARD for model in NUMBERED_MODELS for name in SHARDS}
    files |= {f"{model}/{name}": SHARD for model in UNNUMBERED_MODELS for name in UNNUMBERED}
    files |= {f"{SMALL_MODEL}/{number:03}": 50_000 for number in range(SMALL_FILES)}
    for number, (name, size) in enumerate(files.items()):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(draw.randbytes(size + number))
    index = json.dumps({"weight_map": {f"layer.{number}": name for number, name in enumerate(SHARDS)}})
    for model in NUMBERED_MODELS:
        (bucket / model / INDEX).write_text(index)


class Loader:
    """Loads models in the order of their files, whole or to some file; one file stays mapped for longer."""

    def __init__(self, mount: Path, store: Path, seed: int) -> None:
        self._mount = mount
        self._store = store
        self._draw = random.Random(seed)
        self._kept: tuple[str, mmap.mmap] | None = None
        self.report = Report()

    def round(self) -> None:
        """Load a model drawn at random, and look once more at what has been mapped for longer."""
        model = self._draw.choice([*NUMBERED_MODELS, *UNNUMBERED_MODELS, SMALL_MODEL])
        names = self._names(model)
        if self._draw.random() < 0.2:  # the program ends, or wants no more of it
            del names[self._draw.randrange(1, len(names)) :]
        kept = self._draw.choice(names)
        for name in names:
            if name == kept:
                self._keep(f"{model}/{name}")
            elif self._draw.random() < 0.5:
                self.read(f"{model}/{name}")
            else:
                self._map(f"{model}/{name}").close()
            if model != SMALL_MODEL:
                time.sleep(self._draw.uniform(0, MOST_PAUSE_S))

    def read(self, name: str) -> None:
        with self._open(name) as file, self.report.timing("read"):
            found = file.read()
        self._compare("read", name, found)

    def _names(self, model: str) -> list[str]:
        if model in UNNUMBERED_MODELS:
            return [*UNNUMBERED]
        if model in NUMBERED_MODELS:
            self.read(f"{model}/{INDEX}")
            return [*SHARDS]
        with self.report.timing("ls"):
            names = sorted(os.listdir(self._mount / model))
        self.report.compare("ls", model, names == sorted(os.listdir(self._store / model)))
        return names

    def _open(self, name: str) -> io.BufferedReader:
        with self.report.timing("open"):
            return (self._mount / name).open("rb")

    def _map(self, name: str) -> mmap.mmap:
        with self._open(name) as file:
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._touch(name, mapping)
        return mapping

    def _keep(self, name: str) -> None:
        mapping = self._map(name)
        if self._kept is not None:
            self._touch(*self._kept)
            self._kept[1].close()
        self._kept = name, mapping

    def _touch(self, name: str, mapping: mmap.mmap) -> None:
        with self.report.timing("touch"):
            found = mapping[:]
        self._compare("touch", name, found)

    def _compare(self, kind: str, name: str, found: bytes) -> None:
        self.report.compare(kind, name, found == (self._store / name).read_bytes())
