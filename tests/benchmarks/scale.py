"""How much is measured: all of it, or a quick look."""

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes in bytes, times in seconds, the rest counts, by default those of a full run.

    *llama* is layers and width, *touched* what is written before each cold measurement.
    """

    big: int = 512 * MIB
    profile: int = 256 * MIB
    store: int = 2 * GIB
    processes: tuple[int, ...] = (1, 8, 32)
    directories: tuple[int, ...] = (10, 1_000, 10_000, 100_000)
    sizes: tuple[int, ...] = (8 * MIB, 64 * MIB, 512 * MIB)
    cold_open_sizes: tuple[int, ...] = (MIB, 64 * MIB, 512 * MIB)
    cold_repetitions: int = 3
    warm_repetitions: int = 4
    operations: int = 5_000
    idle_operations: int = 500
    timeout_s: float = 60
    llama: tuple[int, int] = (9, 2048)
    onnx: int = 256 * MIB
    file: int = GIB
    shard: int = 256 * MIB
    touched: int = 4 * GIB
    model_repetitions: int = 2
    starts: int = 20
    starts_at_once: int = 5
    model_timeout_s: float = 180
    quiet_s: float = 15
    objects: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    objects_in_one_directory: tuple[int, ...] = (1_000, 10_000, 100_000)
    mounts: tuple[int, ...] = (1, 2, 5, 10, 20)
    files: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000)
    sharers: tuple[int, ...] = (1, 4, 16, 64, 256)
    object_gb: tuple[int, ...] = (1, 10, 100, 1_000)
    settle_s: float = 35
    rest_s: float = 10
    growth_timeout_s: float = 600
    small_files: int = 300
    small_size: int = 32 * KIB


FULL = Scale()
QUICK = Scale(
    big=64 * MIB,
    profile=32 * MIB,
    store=64 * MIB,
    processes=(1, 4),
    directories=(10, 1_000),
    sizes=(MIB, 8 * MIB, 64 * MIB),
    cold_open_sizes=(MIB, 64 * MIB),
    cold_repetitions=1,
    warm_repetitions=3,
    operations=2_000,
    idle_operations=200,
    timeout_s=20,
    llama=(4, 1024),
    onnx=64 * MIB,
    file=256 * MIB,
    shard=64 * MIB,
    touched=GIB,
    model_repetitions=1,
    starts=3,
    starts_at_once=1,
    model_timeout_s=60,
    quiet_s=2,
    objects=(1_000, 10_000, 30_000),
    objects_in_one_directory=(1_000, 10_000),
    mounts=(1, 2, 4),
    files=(10, 100, 1_000),
    sharers=(1, 4, 16),
    object_gb=(1, 100, 1_000),
    settle_s=4,
    rest_s=3,
    growth_timeout_s=60,
)


def size_text(size: float) -> str:
    """A number of bytes with a binary unit."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size:.0f} B"
