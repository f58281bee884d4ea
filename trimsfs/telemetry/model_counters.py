"""Counters of each model: bytes fetched, and opens by the tier that they found the file in.

A model is the directory that holds its files, or a file at the root of the mount.
"""

from dataclasses import dataclass
from typing import Literal

from trimsfs.text import printable

Tier = Literal["host", "disk", "store"]

MOST_MODELS = 64
"""Models with counters of their own; the first ones opened or fetched have them."""
OTHERS = "(others)"
"""The model that all further ones are counted as."""
_CONTROL = ".trims/"
"""Part of the keys of blobs that were derived from a model: they lie below its directory."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Numbers by the values of several labels."""

    labels: tuple[str, ...]
    values: dict[tuple[str, ...], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatistics:
    """Of each model: bytes that came from the store and opens by tier since the server started, and the bytes that
    sharing saves now."""

    fetched_bytes: Labelled
    opens: Labelled
    saved_bytes: Labelled


class Counts:
    """What is counted of one model: bytes fetched, and opens by tier."""

    __slots__ = ("disk", "fetched", "host", "store")

    def __init__(self) -> None:
        self.fetched = self.host = self.disk = self.store = 0


class ModelCounters:
    """Counts since the server started."""

    def __init__(self) -> None:
        self._counts: dict[str, Counts] = {}

    def of(self, key: str) -> Counts:
        """The counts of the model of a file."""
        counts = self._counts.get(model_of(key))
        return counts if counts is not None else self._new(model_of(key))

    def _new(self, model: str) -> Counts:
        return self._counts.setdefault(model if len(self._counts) < MOST_MODELS else OTHERS, Counts())

    def fetched(self, key: str, size: int) -> None:
        """Bytes of a file came from the store."""
        self.of(key).fetched += size

    def opened(self, key: str, tier: Tier) -> None:
        """A file was opened that a tier had."""
        counts = self.of(key)
        setattr(counts, tier, getattr(counts, tier) + 1)

    def statistics(self, saved: dict[str, int]) -> ModelStatistics:
        """The counts. *saved* has the bytes that sharing saves now, by model as `model_of` names it."""
        saved_by_model = dict.fromkeys(self._counts, 0)
        for model, size in saved.items():
            name = model if model in saved_by_model else OTHERS
            saved_by_model[name] = saved_by_model.get(name, 0) + size
        tiers: tuple[Tier, ...] = ("host", "disk", "store")
        items = [(shown(model), counts) for model, counts in self._counts.items()]
        return ModelStatistics(
            fetched_bytes=Labelled(("model",), {(name,): counts.fetched for name, counts in items}),
            opens=Labelled(
                ("model", "tier"), {(name, tier): getattr(counts, tier) for name, counts in items for tier in tiers}
            ),
            saved_bytes=Labelled(("model",), {(shown(model),): size for model, size in saved_by_model.items()}),
        )


def model_of(key: str) -> str:
    """The model that a file belongs to: its directory, without a slash at the end, or the file at the root."""
    start = key.find(_CONTROL)
    if start >= 0:
        return key[:start].rstrip("/") or key[len(_CONTROL) :].partition("/")[0]
    slash = key.rfind("/")
    return key if slash < 0 else key[:slash]


def shown(name: str) -> str:
    """A name from the store as text of one line."""
    return printable(name.encode(errors="surrogateescape").decode(errors="replace"))
