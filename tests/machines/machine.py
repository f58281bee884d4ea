"""Virtual machines by QEMU, without the processor's help: a tenth of a real machine's speed."""

import contextlib
import shlex
import socket
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.machines.images import Image

BOOT_TIMEOUT_S = 400
BOOTS = 3
"""How often to start a machine: on a busy host, kernels sometimes wait for ever for a timer that QEMU has lost."""
TIMEOUT_S = 600
END_TIMEOUT_S = 60
SSH = (
    *("ssh", "-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=30", "-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=4"),
)
HOST = "10.0.2.2"
"""The address by which a machine reaches what this host serves on 127.0.0.1."""


@dataclass(slots=True)
class Machine:
    """A machine that runs. Its ``console`` has what its kernel prints; ``release`` is the kernel's, as of uname(2)."""

    process: "subprocess.Popen[bytes]"
    port: int
    key: Path
    console: Path
    release: str = ""

    def run(self, script: str, *, timeout_s: float = TIMEOUT_S) -> str:
        """Run a shell script as root, which ends with its first error; what it prints."""
        done = self._ssh(f"bash -euxo pipefail -c {shlex.quote(script)}", timeout_s)
        said = f"{done.stdout[-4000:]}{done.stderr[-8000:]}\n{self._console_tail()}"
        assert done.returncode == 0, said
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """Write a file."""
        self.run(f"mkdir -p $(dirname {path}); echo {b64encode(text.encode()).decode()} | base64 -d > {path}")

    def boot_id(self) -> str:
        """The identifier of this boot."""
        return self.run("cat /proc/sys/kernel/random/boot_id").strip()

    def wait(self, *, after: str = "") -> None:
        """Wait until it lets root in and systemd has started all, in another boot than that *after* which it comes."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = self._ssh(
                    "cat /proc/sys/kernel/random/boot_id; systemctl is-system-running --wait; uname -r", 180
                )
                answers = done.stdout.split()
                if len(answers) == 3 and answers[0] != after:
                    self.release = answers[2]
                    return
            time.sleep(1)
        raise TimeoutError(f"the machine lets nobody in:\n{self._console_tail()}")

    def reboot(self) -> None:
        """Restart it in an orderly way."""
        before = self.boot_id()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the connection may hang as the machine ends
            self._ssh("systemctl reboot", END_TIMEOUT_S)
        self.wait(after=before)

    def _ssh(self, command: str, timeout_s: float) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*SSH, "-i", str(self.key), "-p", f"{self.port}", "root@127.0.0.1", command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def _console_tail(self) -> str:
        return self.console.read_text(errors="replace")[-3000:] if self.console.exists() else ""


@contextmanager
def booted(image: Image, kernel: str, directory: Path, *, disks: tuple[str, ...] = ()) -> Iterator[Machine]:
    """A machine that runs a kernel, with a disk of its own in a directory, and other *disks*, options of QEMU.

    It ends with the block, however that does.
    """
    disk, console = directory / "disk.qcow2", directory / "console"
    source = f"backing_file={image.disk},backing_fmt=raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", source, disk], check=True)
    linux, initial = image.kernel(kernel)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "qemu-system-x86_64",
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", "2", "-m", "2048", "-display", "none", "-serial", f"file:{console}"),
        *("-kernel", str(linux), "-initrd", str(initial)),
        *("-append", "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=0"),
        *("-drive", f"file={disk},if=none,id=root,format=qcow2,cache=unsafe,discard=unmap"),
        *("-device", "virtio-blk-pci,drive=root"),  # the first device is /dev/vda
        *disks,
        *("-device", "virtio-rng-pci", "-device", "virtio-net-pci,netdev=net"),
        *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22"),
    ]
    with contextlib.ExitStack() as stack:
        for boots_left in reversed(range(BOOTS)):
            process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.DEVNULL))
            stack.callback(process.kill)
            machine = Machine(process, port, image.key, console)
            try:
                machine.wait()
                break
            except TimeoutError:
                if not boots_left:
                    raise
                stack.close()
        yield machine
