"""How copies on GPUs plug into a server: the driver is loaded while the process is still root."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.copies import GpuCopies
from trimsfs.extras.gpu.copy_ledger import CopyLedger
from trimsfs.extras.gpu.copy_loader import CopyLoader
from trimsfs.extras.gpu.cuda import CudaUnavailableError
from trimsfs.extras.gpu.descriptor_server import DescriptorServer
from trimsfs.extras.gpu.interface import GpuInterface
from trimsfs.mountinfo import lies_on
from trimsfs.options import GPU_OFF, MountOptions
from trimsfs.server.plugin import Core, ServerPlugin

DEVICES = Path("/dev")


class GpuPlugin(ServerPlugin):
    """Copies on GPUs."""

    def __init__(self, options: MountOptions, *, alone: bool) -> None:
        del alone
        self._off = options.gpu == "off"
        self._unavailable = GPU_OFF if self._off else _load_driver()

    def writable(self) -> Sequence[Path]:
        """The devices."""
        return [] if self._off else [*DEVICES.glob("nvidia*")]

    def build(self, core: Core) -> GpuInterface:
        """The copies of a mount. Clients can get descriptors of them if the keeper can listen."""
        environment, disk = core.environment, core.tiers.disk
        ledger = CopyLedger(environment.ledger, environment.keeper)
        copies = GpuCopies(
            disk.blobs,
            disk.residencies,
            CopyLoader(disk.blobs, core.fetching.fetcher, ledger, in_memory=lies_on(disk.directory, "tmpfs")),
            core.fetching.tables,
            ledger,
            core.options,
            unavailable=self._unavailable,
        )
        interface = GpuInterface(copies)
        interface.services = [copies.run]
        if self._unavailable is None:
            interface.services.append(partial(_serve_descriptors, environment.keeper.listen, interface.descriptors))
        return interface


def _load_driver() -> str | None:
    """Load the driver; why no GPU can be used, or None."""
    try:
        cuda.load_driver()
    except CudaUnavailableError as error:
        return str(error)
    return None


async def _serve_descriptors(
    listen: Callable[[], Awaitable[tuple[Path, int] | None]],
    descriptors: DescriptorServer,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hand descriptors of copies to clients, if the keeper can listen for them."""
    listener = await listen()
    if listener is None:
        task_status.started()
    else:
        await descriptors.run(*listener, task_status=task_status)
