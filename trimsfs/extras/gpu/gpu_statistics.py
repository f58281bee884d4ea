"""Statistics of the copies on GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass

from trimsfs.extras.gpu.tier.leased_copies import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStatistics:
    """For each device: the bytes that copies use and may use, current copies and leases, and counts since the start.

    A hit is a request for a copy that is loaded or loading.
    """

    device_used_bytes: dict[str, int]
    device_budget_bytes: dict[str, int]
    device_copies: dict[str, int]
    device_leases: dict[str, int]
    device_hits: dict[str, int]
    device_loads: dict[str, int]
    device_failed_loads: dict[str, int]
    device_loaded_bytes: dict[str, int]
    device_load_seconds: dict[str, float]
    device_evictions: dict[str, int]
    device_evicted_bytes: dict[str, int]


def statistics_of(pools: Mapping[str, Pool]) -> GpuStatistics:
    """The statistics of the devices, by UUID."""
    return GpuStatistics(
        device_used_bytes={uuid: pool.used for uuid, pool in pools.items()},
        device_budget_bytes={uuid: pool.budget for uuid, pool in pools.items()},
        device_copies={uuid: len(pool.copies) for uuid, pool in pools.items()},
        device_leases={uuid: sum(len(copy.leases) for copy in pool.copies) for uuid, pool in pools.items()},
        device_hits={uuid: pool.counts.hits for uuid, pool in pools.items()},
        device_loads={uuid: pool.counts.loads for uuid, pool in pools.items()},
        device_failed_loads={uuid: pool.counts.failed_loads for uuid, pool in pools.items()},
        device_loaded_bytes={uuid: pool.counts.loaded_bytes for uuid, pool in pools.items()},
        device_load_seconds={uuid: pool.counts.load_seconds for uuid, pool in pools.items()},
        device_evictions={uuid: pool.counts.evictions for uuid, pool in pools.items()},
        device_evicted_bytes={uuid: pool.counts.evicted_bytes for uuid, pool in pools.items()},
    )
