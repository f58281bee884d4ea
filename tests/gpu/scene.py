"""A mount with emulated GPUs, and programs that use them, for the length of a block."""

import hashlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trimsfs
from tests.cuda import KernelDriver, environment
from tests.support.mounts import MountedStore, mounted, wait_until

MIB = 1 << 20
SIZE = 5 * MIB + 12_345
"""Bytes of each file of the fixture ``store``."""
ANSWER_TIMEOUT_S = 40
HEADROOM = ("gpu_headroom=2MiB",)
OTHER_USER = 4711
NOWHERE = "GPU-00000000-0000-0000-0000-000000000000"


def digest_of(store: Path, name: str = "net.bin") -> str:
    """Of a file's content."""
    return hashlib.sha256((store / name).read_bytes()).hexdigest()


class Program:
    """A running `tests.gpu.borrower`, in a sandbox if one is given by its command line."""

    def __init__(self, variables: dict[str, str], sandbox: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*sandbox, sys.executable, "-m", "tests.gpu.borrower"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | variables,
            cwd=Path(trimsfs.__file__).parent.parent,
        )

    def tell(self, do: str, **arguments: Any) -> None:
        """Give an order, whose `answer` is not waited for."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """The answer to the last order."""
        output = self._process.stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], timeout_s)
        assert ready, "no answer in time"
        line = output.readline()
        assert line, "the program has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give an order, and have it answered."""
        self.tell(do, **arguments)
        return self.answer()

    def digest(self) -> str:
        """Of the bytes on the device."""
        return str(self.ask("digest").get("digest"))

    def kill(self) -> None:
        """End it with SIGKILL; it is gone when this returns."""
        self._process.kill()
        self._process.wait(20)

    def wait(self) -> int:
        """Its exit code, once it has ended by itself."""
        return self._process.wait(20)

    def end(self) -> None:
        """Have it end, whatever it does."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait(20)


@dataclass(slots=True)
class Scene:
    """A mount, and the devices that it has."""

    mount: MountedStore
    kernel: KernelDriver
    programs: list[Program]

    @property
    def devices(self) -> list[str]:
        """The devices' UUIDs."""
        return [device.uuid for device in self.kernel.devices]

    @property
    def device(self) -> str:
        """The first device."""
        return self.devices[0]

    @property
    def server(self) -> int:
        """The server's process."""
        return int(self.mount.control()["server_pid"])

    def file(self, name: str) -> Path:
        """A model file."""
        return self.mount.path / name

    def control_file(self, name: str = "net.bin", asked: str | None = None) -> str:
        """The control file of a file's copy, on the first device unless something else is asked for."""
        path = self.file(name)
        return str(path.parent / ".trims" / path.name / "gpu" / (asked or self.device))

    def load(self, name: str) -> None:
        """Have a copy loaded on the first device, and leased to nobody when this returns."""
        os.close(os.open(self.control_file(name), os.O_RDONLY))
        wait_until(lambda: not any(copy["leased"] for copy in self.copies() if copy["path"] == name))

    def refused(self, name: str = "net.bin", asked: str | None = None) -> int:
        """The error number of asking for a copy."""
        return int(self.program().ask("control_file", path=self.control_file(name, asked))["errno"])

    def another_user(self) -> Program:
        """A program of a user who is not root."""
        program = self.program()
        program.ask("become", uid=OTHER_USER)
        return program

    def program(self, *, transparent: bool = False, sandbox: Sequence[str] = ()) -> Program:
        """A program, ended with the scene."""
        program = Program(environment(self.kernel, transparent=transparent), sandbox)
        self.programs.append(program)
        return program

    def borrowing(self, name: str = "net.bin", asked: str | None = None) -> Program:
        """A program that has opened a copy and uses it."""
        program = self.program()
        told = program.ask("control_file", path=self.control_file(name, asked))
        assert "error" not in told, told
        return program

    def _devices(self) -> list[dict[str, Any]]:
        devices: list[dict[str, Any]] = json.loads((self.mount.path / ".trims/gpu").read_text())["devices"]
        return devices

    def copies(self, device: int = 0) -> list[dict[str, Any]]:
        """The copies on a device, as operators see them."""
        wait_until(lambda: len(self._devices()) > device)  # a server that has just taken over looks for them
        found: list[dict[str, Any]] = self._devices()[device]["copies"]
        return found

    def wait_until_loading(self) -> None:
        """Wait until the one copy on the first device is being loaded."""
        wait_until(lambda: [copy["state"] for copy in self.copies()] == ["loading"])

    def leases(self) -> int:
        """How many leases there are of copies on the first device."""
        return sum(copy["leased"] for copy in self.copies())

    def counted(self, field: str, device: int = 0) -> float:
        """A number of a device from the metrics."""
        name = f'trimsfs_gpu_device_{field}{{device="{self.kernel.devices[device].uuid}"}} '
        lines = (self.mount.path / ".trims/metrics").read_text().splitlines()
        return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    def kill_server(self) -> None:
        """End the server with SIGKILL; another answers when this returns."""
        before = self.server
        os.kill(before, 9)
        wait_until(lambda: self.server != before, 20)


@contextmanager
def scene(
    store: str | Path,
    directory: Path,
    *options: str,
    memory: Sequence[int] = (64 * MIB, 64 * MIB),
    variables: Mapping[str, str] | None = None,
) -> Iterator[Scene]:
    """Mount a store on a host with devices of so many bytes."""
    place = directory / "kernel"
    place.mkdir()
    place.chmod(0o755)
    with KernelDriver(place, memory) as kernel:
        given = environment(kernel) | dict(variables or {})
        with mounted(store, directory / "mount", *HEADROOM, *options, environment=given) as mount:
            found = Scene(mount, kernel, [])
            try:
                yield found
            finally:
                for program in found.programs:
                    program.end()
