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
        "circuit_open",
        "coming_files",
        "connected",
        "descriptor_limit",
        "device_budget_bytes",
        "device_copies",
        "device_leases",
        "device_used_bytes",
        "directories",
        "doubtful",
        "hidden_keys",
        "in_flight",
        "inodes",
        "locked_bytes",
        "open_blobs",
        "open_descriptors",
        "open_handles",
        "passthrough_handles",
        "processes",
        "rate",
        "request_limit",
        "started",
        "tenant_used_bytes",
        "to_compare",
        "used_bytes",
        "waiting",
        "waiting_blobs",
    }
)
"""Fields that go up and down; all others only grow."""

HELP = {
    "disk_used_bytes": "Bytes of models on disk.",
    "disk_budget_bytes": "Most bytes of models on disk, by --cache-size.",
    "disk_open_blobs": "Local copies in use.",
    "disk_evictions": "Local copies removed from disk.",
    "disk_evicted_bytes": "Bytes removed from disk.",
    "disk_corrupt_chunks": "Chunks on disk that failed their checksum and were fetched again.",
    "disk_tenant_used_bytes": "Bytes of models on disk, of each tenant with a share.",
    "disk_refused_chunks": "Chunks fetched and not kept, for want of room on disk.",
    "fetch_fetched_bytes": "Bytes of models that came from the store.",
    "fetch_fetched_chunks": "Chunks that came from the store.",
    "fetch_failed_chunks": "Chunks that could not be fetched, all attempts included.",
    "fetch_verified_chunks": "Chunks of an earlier server whose checksum was right.",
    "fetch_uncached_chunks": "Chunks fetched into memory only.",
    "fetch_in_flight": "Requests for bytes under way.",
    "fetch_waiting": "Chunks that readers wait for and no request has been made for yet.",
    "fetch_request_limit": "Requests for prefetching that may be under way at once, as the store's latency allows.",
    "fetch_rate": "Bytes a second that came from the store, of late, while something was fetched.",
    "files_open_handles": "Open files.",
    "files_passthrough_handles": "Open files that the kernel reads by itself.",
    "files_passthrough_opens": "Opens in passthrough mode.",
    "files_cached_opens": "Opens in cached mode.",
    "files_reads": "Reads answered by the server.",
    "files_read_bytes": "Bytes in reads answered by the server.",
    "files_replaced_while_open": "Times that files were replaced in the store in a directory of which files were open.",
    "gpu_device_used_bytes": "Bytes of each GPU that copies of models take.",
    "gpu_device_budget_bytes": "Most bytes of each GPU that copies may take, by --gpu-memory.",
    "gpu_device_copies": "Copies on each GPU, and on their way there.",
    "gpu_device_leases": "Programs' leases of copies on each GPU.",
    "gpu_device_hits": "Requests for copies that were on the GPU, or on their way there.",
    "gpu_device_loads": "Copies loaded to each GPU.",
    "gpu_device_failed_loads": "Copies that could not be loaded.",
    "gpu_device_loaded_bytes": "Bytes of models copied to each GPU.",
    "gpu_device_load_seconds": "Seconds that the loads have taken, the wait for what was not here included.",
    "gpu_device_evictions": "Copies given up.",
    "gpu_device_evicted_bytes": "Bytes of copies given up.",
    "host_used_bytes": "Bytes of models brought into memory and not evicted from there.",
    "host_budget_bytes": "Most bytes of models in memory, by --host-size.",
    "host_tenant_used_bytes": "Bytes of models brought into memory, of each tenant with a share.",
    "host_locked_bytes": "Bytes of models locked in memory.",
    "host_evictions": "Models dropped from memory.",
    "host_evicted_bytes": "Bytes dropped from memory.",
    "integrity_compared": "Local copies found to have the digest that the store tells.",
    "integrity_differing": "Local copies found to have another digest than the store tells.",
    "integrity_repaired_chunks": "Chunks that were wrong and have been written anew.",
    "integrity_scrubbed_bytes": "Bytes on disk that were read to check them.",
    "integrity_doubtful": "Local copies that are wrong, could not be mended, and are given to nobody.",
    "integrity_to_compare": "Local copies in use that are still to be compared with the store's digest.",
    "keeper_connected": "1 while the keeper runs, 0 once it has ended: see `mountctl recover`.",
    "names_inodes": "Files and directories that the kernel knows.",
    "names_directories": "Directories whose names are known.",
    "names_hidden_keys": "Keys of the store that cannot be files.",
    "prefetch_coming_files": "Files that are coming and that nobody has asked for yet.",
    "prefetch_ahead_files": "Files that came, at least in part, before anybody asked for them.",
    "prefetch_ahead_bytes": "Bytes that came before anybody asked for them.",
    "prefetch_used_files": "Files that came ahead and were opened then.",
    "prefetch_used_bytes": "Bytes of files that came ahead and were opened then.",
    "prefetch_wasted_files": "Files that came ahead and were stopped, evicted or closed before they were opened.",
    "prefetch_wasted_bytes": "Bytes of such files.",
    "server_descriptor_limit": "Most descriptors that the server may have open.",
    "server_open_descriptors": "Descriptors that the server has open.",
    "server_processes": "Processes of the mount: keeper, servers and fetch processes.",
    "server_restarts": "Servers that have been replaced since the file system was mounted.",
    "server_started": "When this server was started, in seconds since the epoch.",
    "sharing_shared_bytes": "Bytes given back to the file system, as models share the blocks of what they have alike.",
    "sharing_waiting_blobs": "Local copies that are still to be compared with others.",
    "signatures_refusals": "Opens and commands refused, as a file has not been signed or is not what has.",
    "store_requests": "Requests to the store, each with all its attempts.",
    "store_failed_attempts": "Attempts at requests that failed and were made again.",
    "store_circuit_open": "1 while the store does not answer and requests fail at once, else 0.",
    "store_circuit_openings": "How often it came to that.",
}
"""What each number is, by component and field."""

Source = Callable[[], Any]


class _Statistics(Collector):
    """Every number of every component's ``statistics()``, as ``trimsfs_<component>_<field>``.

    A field that is a dictionary has a sample for each of its keys, under a label named by the field's first word.
    """

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
                name = f"{component}_{field.name}"
                if isinstance(value, dict):
                    label, _, _ = field.name.partition("_")
                    labelled = family(f"trimsfs_{name}", HELP[name], labels=[label])
                    for which, number in value.items():
                        labelled.add_metric([which.rstrip("/")], number)
                    yield labelled
                else:
                    yield family(f"trimsfs_{name}", HELP[name], value=value)


def renderer(sources: Mapping[str, Source]) -> Callable[[], bytes]:
    """A function that renders the sources' statistics of the moment in the Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Statistics(sources))
    return lambda: generate_latest(registry)


def parse(text: str) -> dict[str, float]:
    """The values in a rendered text by the samples' names, counters with their ``_total``; not those with labels."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if not sample.labels}


def labelled(text: str, label: str) -> dict[str, dict[str, float]]:
    """The values in a rendered text that have a label, by its value and then by name, as those of `parse`."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if label in sample.labels:
                found.setdefault(sample.labels[label], {})[sample.name] = sample.value
    return found
