"""How much is measured on a card: all of it, a quick look, or just that it runs."""

from dataclasses import dataclass

from tests.benchmarks.scale import GIB, KIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuScale:
    """Sizes of models in bytes, times in seconds, the rest counts; by default those of a full run.

    A model of *first* bytes is loaded before anything else is measured on a mount, so that the server has its context
    and its pinned memory. *spare* bytes of the device and of the host are left alone.
    """

    first: int = 64 * MIB
    fills: tuple[int, ...] = (5 * MIB, 64 * MIB, 512 * MIB, 4 * GIB, 16 * GIB)
    fetches: tuple[int, ...] = (64 * MIB, 512 * MIB, 2 * GIB)
    loads: tuple[int, ...] = (512 * MIB, 4 * GIB)
    memory: int = GIB
    processes: int = 8
    fill_rounds: int = 7
    rounds: int = 5
    memory_rounds: int = 3
    timeout_s: float = 120
    spare: int = GIB


FULL = GpuScale()
QUICK = GpuScale(
    fills=(5 * MIB, 64 * MIB, 512 * MIB),
    fetches=(64 * MIB, 512 * MIB),
    loads=(256 * MIB,),
    memory=256 * MIB,
    fill_rounds=5,
    rounds=3,
    memory_rounds=2,
    timeout_s=60,
)
TINY = GpuScale(
    first=256 * KIB,
    fills=(70 * MIB,),
    fetches=(256 * KIB,),
    loads=(256 * KIB,),
    memory=256 * KIB,
    processes=3,
    fill_rounds=2,
    rounds=1,
    memory_rounds=1,
    timeout_s=20,
    spare=16 * MIB,
)
"""For emulated devices, whose figures mean nothing."""
EMULATED_DEVICE = 256 * MIB
