"""How the bytes of a model get to a device: all of them, in their places, as they come."""

import contextlib
import hashlib
import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.scene import MIB, Scene, scene
from tests.services.fast import start_fast
from tests.support import model_files
from tests.support.tmpfs import tmpfs

LAYERS = 300
CHUNK = 8 * MIB


def model() -> dict[str, model_files.Array]:
    """Many tensors of odd sizes, and some that are larger than a chunk."""
    numbers = random.Random(3)
    arrays = {}
    for layer in range(LAYERS):
        size = numbers.choice([1, 3, 64, 1000, 40_000])
        arrays[f"layer/{layer}.weight"] = model_files.Array("float32", (size,), numbers.randbytes(4 * size))
    arrays["large"] = model_files.Array("float32", (5 * MIB,), numbers.randbytes(20 * MIB))
    arrays["last"] = model_files.Array("int64", (2,), struct.pack("<2q", 1, 2))
    return arrays


@pytest.fixture
def store(store_directory: Path) -> Path:
    return store_directory


def on_device(host: Scene, name: str, asked: str | None = None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What is told of a copy, and the bytes of its tensors as the device has them."""
    descriptor = os.open(host.control_file(name, asked), os.O_RDONLY)
    told = json.loads(os.pread(descriptor, 8 * MIB, 0))
    (allocation,) = [one for one in host.kernel.devices[0].allocations() if one.nbytes == told["size"]]
    image = host.kernel.read(allocation.number, 0, told["nbytes"])
    os.close(descriptor)
    return told, {
        tensor["name"]: image[tensor["offset"] : tensor["offset"] + tensor["nbytes"]] for tensor in told["tensors"]
    }


@pytest.mark.parametrize(
    "write", [model_files.safetensors, model_files.mxnet, model_files.gguf, model_files.npz, model_files.torch]
)
def test_tensors_of_every_format_are_where_they_are_said_to_be(store: Path, tmp_path: Path, write: Any) -> None:
    arrays = {name.replace("/", "."): array for name, array in list(model().items())[-40:]}
    (store / "net").write_bytes(write(arrays))
    with scene(store, tmp_path) as host:
        told, tensors = on_device(host, "net")

        assert {name.removesuffix(".npy"): data for name, data in tensors.items()} == {
            name: array.data for name, array in arrays.items()
        }
        assert all(tensor["offset"] % 256 == 0 for tensor in told["tensors"])
        assert told["format"] is not None


def test_some_tensors_can_be_asked_for(store: Path, tmp_path: Path) -> None:
    arrays = model()
    (store / "net").write_bytes(model_files.safetensors(arrays))
    with scene(store, tmp_path) as host:
        _, some = on_device(host, "net", f"{host.device}@layer%2F1?.weight")
        assert some == {f"layer/{layer}.weight": arrays[f"layer/{layer}.weight"].data for layer in range(10, 20)}
        assert host.kernel.devices[0].used == 2 * MIB
        whole, everything = on_device(host, "net")
        assert len(everything) == len(arrays)
        loads = host.counted("loads_total")
        descriptor = os.open(host.control_file("net", f"{host.device}@large"), os.O_RDONLY)
        told = json.loads(os.read(descriptor, MIB))
        os.close(descriptor)
        assert (told["size"], [tensor["name"] for tensor in told["tensors"]]) == (whole["size"], ["large"])
        assert host.counted("loads_total") == loads  # of the whole copy


@pytest.mark.parametrize("kind", ["", ".ipc"])
def test_nothing_of_before_is_between_the_tensors_or_behind_the_last(store: Path, tmp_path: Path, kind: str) -> None:
    arrays = {f"t{index}": model_files.Array("float16", (1,), b"ab") for index in range(500)}
    (store / "net").write_bytes(model_files.safetensors(arrays))
    with scene(store, tmp_path) as host:
        told = host.program().ask("control_file", path=host.control_file("net", host.device + kind), use=False)
        (allocation,) = host.kernel.devices[0].allocations()
        assert set(host.kernel.read(allocation.number, 0, told["size"])) == {0, ord("a"), ord("b")}


def test_a_model_that_is_not_here_goes_to_the_device_as_it_comes(tmp_path: Path) -> None:
    bucket = tmp_path / "buckets" / "models"
    bucket.mkdir(parents=True)
    content = random.Random(4).randbytes(12 * CHUNK + 77)
    (bucket / "net.bin").write_bytes(content)
    with start_fast(tmp_path / "buckets", rate=8 * MIB) as server:
        options = ("--endpoint-url", server.endpoint_url, "--addressing-style", "path")
        memory = [2 * len(content)]
        with scene("s3://models", tmp_path, *options, memory=memory, variables=server.environment()) as host:
            program = host.program()
            program.tell("control_file", path=host.control_file("net.bin"))
            seen: list[tuple[int, int]] = []
            deadline = time.monotonic() + 40
            while not seen or seen[-1][0] < len(content):
                assert time.monotonic() < deadline
                seen.append((host.kernel.devices[0].bytes_to_device, int(fetched(host))))
                time.sleep(0.02)

            assert program.answer()["nbytes"] == len(content)
            assert program.digest() == hashlib.sha256(content).hexdigest()
            on_the_way = [copied for copied, fetched in seen if 0 < copied < len(content) and fetched < len(content)]
            assert on_the_way
            assert fetched(host) == len(content)


def fetched(host: Scene) -> float:
    return host.mount.metrics()["trimsfs_fetch_fetched_bytes_total"]


@pytest.mark.parametrize("in_memory", [False, True])
def test_where_the_cache_is_in_memory_the_device_copies_from_there(
    store: Path, tmp_path: Path, in_memory: bool
) -> None:
    arrays = model()
    (store / "net").write_bytes(model_files.safetensors(arrays))
    cache = tmp_path / "mount" / "cache"
    cache.parent.mkdir()
    with contextlib.ExitStack() as stack:
        if in_memory:
            stack.enter_context(tmpfs(cache, 256 * MIB))
        host = stack.enter_context(scene(store, tmp_path, "--min-free", "1MiB"))
        assert host.file("net").read_bytes() == (store / "net").read_bytes()
        assert host.mount.info("net")["residency"]["disk"] == (store / "net").stat().st_size
        _, tensors = on_device(host, "net")

        assert tensors == {name: array.data for name, array in arrays.items()}
        # Through buffers of a chunk each, tensors come together; from where they are, each by itself.
        assert (host.kernel.devices[0].copies >= len(arrays)) == in_memory


def test_a_copy_is_filled_with_room_for_nothing_on_disk(store: Path, tmp_path: Path) -> None:
    content = random.Random(8).randbytes(3 * CHUNK + 1)
    (store / "net.bin").write_bytes(content)
    with scene(store, tmp_path, "--cache-size", "1MiB") as host:
        assert host.borrowing("net.bin").digest() == hashlib.sha256(content).hexdigest()
