"""Statistics of the components as Prometheus text. The only home of prometheus_client."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

GAUGES = frozenset(
    {
        "budget_bytes",
        "directories",
        "hidden_keys",
        "in_flight",
        "inodes",
        "locked_bytes",
        "open_blobs",
        "open_handles",
        "passthrough_handles",
        "rate",
        "request_limit",
        "used_bytes",
        "waiting",
    }
)
"""Fields that go up and down; all others only grow."""

Source = Callable[[], Any]


class _Statistics(Collector):
    """Every number of every component's ``statistics()``, as ``trimsfs_<component>_<field>``."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        for component, source in self._sources.items():
            statistics = source()
            for field in dataclasses.fields(statistics):
                value = getattr(statistics, field.name)
                if value is None:
                    continue
                family = GaugeMetricFamily if field.name in GAUGES else CounterMetricFamily
                name = f"trimsfs_{component}_{field.name}"
                yield family(name, f"{field.name.replace('_', ' ')} ({component})", value=value)


def renderer(sources: Mapping[str, Source]) -> Callable[[], bytes]:
    """A function that renders the sources' statistics of the moment in the Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Statistics(sources))
    return lambda: generate_latest(registry)


def parse(text: str) -> dict[str, float]:
    """The values in a rendered text by the samples' names, counters with their ``_total``."""
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
