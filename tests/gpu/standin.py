"""A stand-in for a mount with a GPU tier: a directory, control files with JSON in them, and a process with the memory.

What it does not do: open and close its files as leases, load by itself, tell of a lost lease. ``python -m
tests.gpu.standin DIRECTORY SOCKET`` prints a line when it serves the models of DIRECTORY; at each line of its input it
makes new tokens, as a server does that takes another's place.
"""

import contextlib
import fnmatch
import json
import os
import secrets
import selectors
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimsfs import cuda
from trimsfs.formats import BufferSource, FormatError, TensorTable, parse

ALIGNMENT = 256
PATTERNS = (None, "net.*", "half", "a/b%*", "none*")


@dataclass(slots=True)
class Copy:
    """A model in a device's memory, and the file that tells of it."""

    file: Path
    told: dict[str, Any]
    memory: cuda.SharedMemory | cuda.LegacyMemory

    def tell(self, path: Path) -> None:
        """Write the control file, with a token that was not there before."""
        if isinstance(self.memory, cuda.LegacyMemory):
            self.told["ipc_handle"] = self.memory.handle().hex()
        else:
            self.told |= {"socket": str(path), "token": secrets.token_hex(16)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.told) + "\n")


def load(model: Path, device: cuda.Found, pattern: str | None, kind: str) -> Copy:
    """Copy a model's tensors whose names match to a device that is current."""
    data = model.read_bytes()
    try:
        table = parse(BufferSource(data), model.name)
    except FormatError:
        table = TensorTable("", ())
    content, tensors = bytearray(), []
    for tensor in table.tensors:
        if pattern is None or fnmatch.fnmatchcase(tensor.name, pattern):
            content += bytes(-len(content) % ALIGNMENT)
            tensors.append(tensor._asdict() | {"offset": len(content)})
            content += data[tensor.offset : tensor.offset + tensor.nbytes]
    content = content if table.format else bytearray(data)
    memory: cuda.SharedMemory | cuda.LegacyMemory
    if kind == "ipc":
        memory = cuda.LegacyMemory.allocate(len(content))
    else:
        memory = cuda.SharedMemory.allocate(device.ordinal, len(content))
    if content:
        cuda.call("cuMemcpyHtoD", memory.address, bytes(content), len(content))
    told = {"device": device.uuid, "generation": f"of {model.name}", "memory": kind, "size": memory.size}
    told |= {"nbytes": len(content), "format": table.format or None, "tensors": tensors}
    quoted = "" if pattern is None else "@" + pattern.replace("%", "%25").replace("/", "%2F")
    name = f"{device.uuid}{'.ipc' if kind == 'ipc' else ''}{quoted}"
    return Copy(model.parent / ".trims" / model.name / "gpu" / name, told, memory)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen()
        yield listener


def answer(connection: socket.socket, copies: list[Copy]) -> None:
    """Give a descriptor of the memory to whoever knows its token."""
    token = json.loads(connection.recv(1 << 16))["token"]
    for copy in copies:
        if copy.told.get("token") == token and isinstance(copy.memory, cuda.SharedMemory):
            descriptor = copy.memory.export()
            socket.send_fds(connection, [json.dumps({"size": copy.memory.size}).encode()], [descriptor])
            os.close(descriptor)
            return
    connection.send(json.dumps({"error": "no such token", "kind": "InvalidRequestError"}).encode())


def main(directory: Path, path: Path) -> None:
    """Serve until the end of the input."""
    copies = []
    for device in cuda.devices():
        cuda.Context(device.ordinal).enter()
        models = [model for model in directory.iterdir() if model.is_file()]
        kinds = [(pattern, kind) for pattern in PATTERNS for kind in ("vmm", "ipc")]
        copies += [load(model, device, *kind) for model in models for kind in kinds]
    with listening(path) as listener, selectors.DefaultSelector() as selector:
        for source in (listener, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        for copy in copies:
            copy.tell(path)
        print("serving", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    with listener.accept()[0] as connection:
                        answer(connection, copies)
                elif not sys.stdin.readline():
                    return
                else:
                    for copy in copies:
                        copy.tell(path)
                    print("replaced", flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
