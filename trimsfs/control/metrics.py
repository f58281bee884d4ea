"""Metrics: the components' statistics as Prometheus text."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from trimsfs.telemetry.histogram import Histogram
from trimsfs.telemetry.model_counters import Labelled

GAUGES = {
    "disk_used_bytes": "Bytes of models on disk.",
    "disk_budget_bytes": "Limit of bytes of models on disk, from --cache-size.",
    "disk_open_blobs": "Local copies in use.",
    "disk_tenant_used_bytes": "Bytes of models on disk, of each tenant with a quota.",
    "fetch_in_flight": "Requests for bytes in flight.",
    "fetch_waiting": "Chunks that readers wait for and no request fetches yet.",
    "fetch_request_limit": "Most prefetch requests in flight; adapts to the store's latency.",
    "fetch_rate": "Recent bytes a second from the store, while requests were in flight.",
    "files_open_handles": "Open files.",
    "files_passthrough_handles": "Open files that the kernel reads without the server.",
    "fleet_on": "1 while this host takes part in its fleet, 0 after `trimsfs fleet off`.",
    "fleet_members": "Members of the fleet, this host included.",
    "fleet_failing_members": "Members that failed when this host last asked them, in the last 5 minutes.",
    "gpu_device_used_bytes": "Bytes that copies take on each GPU.",
    "gpu_device_budget_bytes": "Limit of bytes that copies take on each GPU, from gpu_memory.",
    "gpu_device_copies": "Copies on each GPU, loaded or loading.",
    "gpu_device_leases": "Leases that programs hold of copies on each GPU.",
    "host_used_bytes": "Bytes of models loaded into memory and not evicted; the kernel may have reclaimed some.",
    "host_budget_bytes": "Limit of bytes of models in memory, from --host-size.",
    "host_tenant_used_bytes": "Bytes of models in memory, of each tenant with a quota.",
    "host_locked_bytes": "Bytes of models locked in memory.",
    "integrity_doubtful": "Local copies in quarantine: damaged and not repaired, so reads of them fail.",
    "integrity_to_compare": "Local copies still to be compared with the store's digest.",
    "keeper_connected": "1 while the keeper runs, 0 once it has ended: run `mountctl recover`.",
    "model_saved_bytes": "Bytes of each model that programs would have in memory in addition if each had a copy.",
    "names_inodes": "Files and directories that the kernel knows.",
    "names_directories": "Directories whose listings are known.",
    "names_hidden_keys": "Hidden keys of the store: they cannot be files.",
    "prefetch_coming_files": "Files being prefetched that no program has opened yet.",
    "server_descriptor_limit": "Limit of the server's open descriptors.",
    "server_info": "1, with the version of the server.",
    "server_open_descriptors": "Open descriptors of the server.",
    "server_processes": "Processes of the mount: keeper, servers and fetch processes.",
    "server_started": "When this server was started, in seconds since the epoch.",
    "sharing_waiting_blobs": "Local copies still to be compared with others for equal blocks.",
    "store_circuit_open": "1 while the circuit breaker is open: requests fail at once, as the store does not answer.",
    "stores_circuit_open": "1 while the circuit breaker of this store is open.",
}
"""The help texts of the metrics that are gauges, by component and field."""

HELP = GAUGES | {
    "disk_evictions": "Local copies removed from disk.",
    "disk_evicted_bytes": "Bytes removed from disk.",
    "disk_corrupt_chunks": "Chunks on disk that failed their checksum and were refetched.",
    "disk_refused_chunks": "Chunks fetched but not cached, as the disk had no room.",
    "fetch_fetched_bytes": "Bytes of models that came from the store.",
    "fetch_fetched_chunks": "Chunks that came from the store.",
    "fetch_copied_bytes": "Bytes copied from other versions of their model, instead of fetched.",
    "fetch_failed_chunks": "Chunks that could not be fetched, even with retries.",
    "fetch_verified_chunks": "Chunks of an earlier server that passed their checksum.",
    "fetch_uncached_chunks": "Chunks fetched into memory only.",
    "files_passthrough_opens": "Opens in passthrough mode.",
    "files_cached_opens": "Opens in cached mode.",
    "files_open_seconds": "Seconds that opens of files have waited, by why.",
    "files_first_byte_seconds": "Seconds until a program could have the first byte of a file that was not resident.",
    "files_reads": "Reads answered by the server.",
    "files_read_bytes": "Bytes in reads answered by the server.",
    "files_replaced_while_open": "How often the store replaced files of a directory of which files were open.",
    "fleet_received_bytes": "Bytes that other members have sent.",
    "fleet_received_chunks": "Chunks that other members have sent.",
    "fleet_store_chunks": "Chunks of other members that this host fetched from the store.",
    "fleet_damaged_chunks": "Chunks of other members that failed their checksum.",
    "fleet_slow_requests": "Requests to members given up, as they were too slow.",
    "fleet_busy_requests": "Requests to members that were too busy.",
    "fleet_failed_requests": "Other requests to members that failed.",
    "fleet_member_received_bytes": "Bytes that each of the first 64 members asked has sent.",
    "fleet_member_strikes": "Chunks of each member that failed their checksum.",
    "fleet_served_sent_requests": "Requests of other members for chunks that were sent.",
    "fleet_served_sent_bytes": "Bytes of chunks sent to other members.",
    "fleet_served_refused_requests": "Requests of other members that were refused, as this host sent enough already.",
    "gpu_device_hits": "Requests for copies that were loaded or loading.",
    "gpu_device_loads": "Copies loaded to each GPU.",
    "gpu_device_failed_loads": "Loads of copies that failed.",
    "gpu_device_loaded_bytes": "Bytes of models copied to each GPU.",
    "gpu_device_load_seconds": "Seconds spent loading copies, waits for the store included.",
    "gpu_device_evictions": "Copies evicted from each GPU.",
    "gpu_device_evicted_bytes": "Bytes of copies evicted from each GPU.",
    "host_evictions": "Models evicted from memory.",
    "host_evicted_bytes": "Bytes evicted from memory.",
    "integrity_compared": "Comparisons in which a local copy matched the store's digest.",
    "integrity_differing": "Comparisons in which a local copy did not match the store's digest.",
    "integrity_repaired_chunks": "Wrong chunks overwritten with refetched bytes.",
    "integrity_scrubbed_bytes": "Bytes read from disk to check them.",
    "integrity_comparison_seconds": "Seconds that comparisons of local copies with the store's digests took.",
    "model_fetched_bytes": "Bytes that came from the store, of each model.",
    "model_opens": "Opens of files of each model, by the tier that had the file.",
    "prefetch_ahead_files": "Files prefetched, at least in part, before a program opened them.",
    "prefetch_ahead_bytes": "Bytes prefetched before a program opened their file.",
    "prefetch_used_files": "Prefetched files that a program opened later.",
    "prefetch_used_bytes": "Prefetched bytes of files that a program opened later.",
    "prefetch_wasted_files": "Prefetched files that were cancelled, evicted or closed before a program opened them.",
    "prefetch_wasted_bytes": "Prefetched bytes of such files.",
    "server_restarts": "Servers replaced since the file system was mounted.",
    "sharing_shared_bytes": "Bytes freed on disk, as models share equal blocks.",
    "signatures_refusals": "Opens and commands refused, as a file is unsigned or does not match its signature.",
    "store_requests": "Requests to the store; retries of one do not count.",
    "store_failed_attempts": "Attempts at requests that failed transiently or were refused.",
    "store_circuit_openings": "How often the circuit breaker opened.",
    "stores_requests": "Requests to each of several stores of the mount, by its path.",
    "stores_failed_attempts": "Attempts at requests to each of several stores that failed transiently or were refused.",
    "stores_circuit_openings": "How often the circuit breaker of each of several stores opened.",
    "server_takeover_seconds": "Seconds from the end of the server before until this one answered.",
    "store_request_seconds": "Seconds that attempts at requests to the store took, by their outcome.",
}
"""The help texts of all metrics. Those that are no gauges are counters or histograms."""

Source = Callable[[], Any]


class Collected(Collector):
    """Metrics with all their samples."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _metric(name: str, value: Any) -> Metric:
    full, help_text = f"trimsfs_{name}", HELP[name]
    if isinstance(value, Histogram):
        histogram = HistogramMetricFamily(full, help_text, labels=[value.label] if value.label is not None else [])
        for which, buckets, total in value.buckets():
            histogram.add_metric([which] if value.label is not None else [], buckets, total)
        return histogram
    family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
    if isinstance(value, dict):
        label, _, _ = name.partition("_")[2].partition("_")
        value = Labelled((label,), {(which.rstrip("/"),): number for which, number in value.items()})
    if isinstance(value, Labelled):
        labelled = family(full, help_text, labels=value.labels)
        for values, number in value.values.items():
            labelled.add_metric(values, number)
        return labelled
    return family(full, help_text, value=value)


def renderer(sources: Mapping[str, Source]) -> Callable[[], Iterator[bytes]]:
    """A function that renders the sources' current statistics as Prometheus text, metric by metric.

    Every field of every component's ``statistics()`` is ``trimsfs_<component>_<field>``. A dictionary has one sample
    per key, in a label named after the field's first word. Those of `Labelled` and of `Histogram` name their labels.
    """

    def render() -> Iterator[bytes]:
        for component, source in sources.items():
            statistics = source()
            for field in dataclasses.fields(statistics):
                value = getattr(statistics, field.name)
                if value is not None:
                    yield generate_latest(Collected([_metric(f"{component}_{field.name}", value)]))

    return render


def parse(text: str) -> dict[str, float]:
    """The values without labels in a rendered text, by the samples' names: counters with their ``_total``."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if not sample.labels}


def labelled(text: str, label: str) -> dict[str, dict[str, float]]:
    """The values with a *label* in a rendered text, by the label's value, then by name as in `parse`."""
    values: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if label in sample.labels:
                values.setdefault(sample.labels[label], {})[sample.name] = sample.value
    return values
