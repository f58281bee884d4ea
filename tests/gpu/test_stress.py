"""Everything at once: programs that come and go, too little room, and servers that are killed."""

import errno
import hashlib
import json
import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.gpu.scene import MIB, Program, Scene, scene
from tests.support.mounts import wait_until

SIZE = 3 * MIB + 17
NAMES = [f"net{number}.bin" for number in range(5)]
PROGRAMS = 4
KILLS = 4
LASTS_S = 6.0
WORKS_S = 60
"""How long the users may take after that to have done enough."""
ALLOWED = {
    errno.ENOMEM,  # all that is there is in use
    errno.ENOENT,  # an attribute's copy may have made way
    errno.ENODATA,
    errno.ESTALE,  # lent by handle, by a server that is dead
    None,  # the driver's: a handle that has just become worth nothing
}


class User(threading.Thread):
    """Has a program borrow copies, look at them and give them back, until told to stop."""

    def __init__(self, host: Scene, seed: int, digests: dict[str, str]) -> None:
        super().__init__()
        self._host = host
        self._numbers = random.Random(seed)
        self._digests = digests
        self.stop = threading.Event()
        self.right = self.refused = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        try:
            program = self._host.program()
            while not self.stop.is_set():
                if not self._once(program):
                    program.kill()  # a context that has met lost memory is of no more use
                    program = self._host.program()
        except Exception as error:  # told by the test
            self.wrong.append(repr(error))

    def _once(self, program: Program) -> bool:
        """One loan; whether the program is fit for another."""
        name, memory = self._numbers.choice(NAMES), self._numbers.choice(["vmm", "vmm", "ipc"])
        if self._numbers.random() < 0.5:
            asked = self._host.device + (".ipc" if memory == "ipc" else "")
            told = program.ask("control_file", path=self._host.control_file(name, asked))
        else:
            path, kind = str(self._host.file(name)), int(memory == "ipc")
            told = program.ask("ioctl", path=path, device=self._host.device, memory=kind)
        if "error" in told:
            self.refused += 1
            if told.get("errno") not in ALLOWED and memory == "vmm":
                self.wrong.append(f"{name} {memory}: {told}")
            return "name" not in told
        found = program.ask("digest")
        if "error" in found:
            if memory == "vmm":
                self.wrong.append(f"{name} {memory}: {found}")
            return False
        if found["digest"] != self._digests[name]:
            self.wrong.append(f"{name} {memory}: other bytes")
        self.right += 1
        if self._numbers.random() < 0.1:
            return False
        program.ask("close")
        return True


@pytest.mark.alone  # counts what is done in a time
def test_bytes_are_right_and_books_are_kept_whatever_happens(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for name in NAMES:
        (store / name).write_bytes(random.Random(name).randbytes(SIZE))
    digests = {name: hashlib.sha256((store / name).read_bytes()).hexdigest() for name in NAMES}
    with scene(store, tmp_path, memory=[24 * MIB]) as host:
        users = [User(host, seed, digests) for seed in range(PROGRAMS)]
        for user in users:
            user.start()
        for _ in range(KILLS):
            time.sleep(LASTS_S / KILLS)
            host.kill_server()
        ends = time.monotonic() + WORKS_S
        while sum(user.right for user in users) <= 50 and time.monotonic() < ends:
            time.sleep(0.05)
        for user in users:
            user.stop.set()
        for user in users:
            user.join(60)
            assert not user.is_alive()

        assert [complaint for user in users for complaint in user.wrong] == []
        assert sum(user.right for user in users) > 50
        for program in host.programs:
            program.end()
        wait_until(lambda: host.leases() == 0)
        device = host.kernel.devices[0]
        wait_until(lambda: device.used == host.counted("used_bytes") == sum(copy["bytes"] for copy in host.copies()))
        for name in NAMES:
            descriptor = os.open(host.control_file(name), os.O_RDONLY)
            assert json.loads(os.read(descriptor, 1 << 16))["nbytes"] == SIZE
            os.close(descriptor)
        assert "Traceback" not in host.mount.log()
