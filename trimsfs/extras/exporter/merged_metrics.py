"""Makes one Prometheus text of those of all mounts, each sample with a label for its mount."""

from collections.abc import Mapping

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from trimsfs.control.metrics import Collected
from trimsfs.text import printable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABEL = "mountpoint"
UP = "trimsfs_up"

Families = dict[str, Metric]


def parsed(text: str) -> Families:
    """The metrics in a text by their names. Raises ValueError."""
    try:
        return {family.name: family for family in text_string_to_metric_families(text)}
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"its metrics cannot be read: {error}") from error


def merged(mounts: Mapping[str, Families | None]) -> bytes:
    """The metrics of all mounts as one text; None is a mount that does not answer. Names that do not begin with
    ``trimsfs_`` are left out, as are times and what a mount tells of another's."""
    metrics: Families = {}
    up = GaugeMetricFamily(UP, "1 while the mount answers, else 0.", labels=[LABEL])
    for mountpoint, families in mounts.items():
        label = {LABEL: printable(mountpoint)}
        up.add_metric([label[LABEL]], int(families is not None))
        for name, family in (families or {}).items():
            if name.startswith("trimsfs_") and name != UP:
                known = metrics.setdefault(name, Metric(name, family.documentation, family.type))
                known.samples += [Sample(each.name, each.labels | label, each.value) for each in family.samples]
    return generate_latest(Collected([up, *metrics.values()]))


def total(families: Families, name: str) -> float:
    """The sum of a metric's samples, by the sample's full name; 0 for none."""
    family = families.get(name.removesuffix("_total"))
    samples: list[Sample] = family.samples if family is not None else []
    return sum(sample.value for sample in samples if sample.name == name)
