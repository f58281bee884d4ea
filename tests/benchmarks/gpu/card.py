"""The card that is measured: what it is, and how its host is connected to it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.children import Child
from tests.benchmarks.scale import GIB
from tests.cuda import KernelDriver, environment
from trimsfs.extras.gpu import cuda

FACTS_S = 60
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""Of PCIe, by billions of transfers a second in each lane."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The first device that processes with the variables of *environment* see; *free* bytes were so at first."""

    uuid: str
    name: str
    total: int
    free: int
    capability: str
    cuda: str
    driver: str
    pci: str
    emulated: bool
    environment: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, str | int | bool]:
        """For the report."""
        return {
            "card": self.name,
            "card_memory_bytes": self.total,
            "card_free_bytes": self.free,
            "compute_capability": self.capability,
            "driver": self.driver,
            "cuda_driver_api": self.cuda,
            "pcie_most": link(self.pci, "max"),
            "emulated": self.emulated,
        }


def check() -> None:
    """See whether there is a card; makes no context. Raises CudaError, which says what is missing."""
    if not cuda.devices():
        raise cuda.CudaUnavailableError("the driver shows no device")


def card() -> Card:
    """The card of this host. Raises ChildError."""
    return _asked({}, emulated=False)


@contextmanager
def emulated(directory: Path, size: int) -> Iterator[Card]:
    """An emulated device of *size* bytes, which is no card."""
    with KernelDriver(directory, [size]) as kernel:
        yield _asked(environment(kernel), emulated=True)


def _asked(variables: Mapping[str, str], *, emulated: bool) -> Card:
    """By a process of its own: a context of this one would take memory of the device all the time."""
    reported = Child("gpu.device", "facts", environment=variables).run(FACTS_S)
    return Card(**reported, driver=_driver(emulated=emulated), emulated=emulated, environment=variables)


def _driver(*, emulated: bool) -> str:
    """The version of the kernel's driver."""
    if emulated:
        return "emulated"
    with suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    return "of unknown version"


def link(pci: str, which: str) -> str:
    """The PCIe link of a device as it is now (*which* is ``current``), or could be at most (``max``).

    The driver's interface does not tell, but the kernel does, where it shows the host's PCI devices.
    """
    directory = Path("/sys/bus/pci/devices") / pci
    with suppress(OSError):
        speed = (directory / f"{which}_link_speed").read_text().split()[0]
        width = (directory / f"{which}_link_width").read_text().strip()
        return f"PCIe {_GENERATIONS.get(speed, f'with {speed} GT/s')} x{width}"
    return "not told"


def text(facts: Mapping[str, str | int | bool]) -> str:
    """The card in a line."""
    if facts["emulated"]:
        return "an emulated driver, which has no GPU"
    return (
        f"{facts['card']}, {int(facts['card_memory_bytes']) / GIB:.0f} GiB, compute capability "
        f"{facts['compute_capability']}, driver {facts['driver']} (CUDA {facts['cuda_driver_api']}), "
        f"link: {facts['pcie_in_use']} while it copied, {facts['pcie_most']} at most"
    )
