"""Guests and host share one copy of a model: QEMU without the processor's help, Debian's kernel."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from tests.images.guests import booted
from tests.support.mounts import mounted
from tests.support.processes import mapped_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SIZE, SHARDS = 500 << 20, 32


def sums(store: Path) -> dict[str, str]:
    files = [path for path in store.rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_guests_and_host_have_one_copy(tmp_path: Path, count: int) -> None:
    store = tmp_path / "store"
    (store / "llama").mkdir(parents=True)
    (store / "llama/model.safetensors").write_bytes(os.urandom(SIZE + 12_345))
    (store / "llama/config.json").write_bytes(b"{}")
    with mounted(store, tmp_path) as mount:
        model = mount.path / "llama/model.safetensors"
        with booted([mount.path / "llama"], tmp_path, count=count) as guests:
            for guest in guests:
                assert guest.sums() == sums(store)
                assert "dax=always" in guest.lines("options")[0]
                assert "Read-only file system" in guest.lines("write")[0]
            pids = [guest.process.pid for guest in guests]
            shares = [mapped_bytes(pid, model.name) for pid in pids]
            print(f"\n{count} guests: {shares}, {[guest.lines('memory') for guest in guests]}")
            assert sum(shares) <= 1.01 * SIZE, "their shares add up to one copy"
            assert all(mapped_bytes(pid, model.name, "Rss") >= 0.95 * SIZE for pid in pids)
            assert not any(mapped_bytes(pid, model.name, "Private_Dirty") for pid in pids)
        assert model.read_bytes() == (store / "llama/model.safetensors").read_bytes(), "nobody has written to it"


def test_a_guest_reads_a_model_of_many_files(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for number in range(SHARDS):
        path = store / f"mixtral/model-{number:05}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(number).randbytes((4 << 20) + number * 4099))
    with mounted(store, tmp_path) as mount, booted([mount.path], tmp_path, count=1) as (guest,):
        assert guest.sums() == sums(store)
        assert "dax=always" in guest.lines("options")[0]
        assert len(json.loads((tmp_path / "models.erofs.json").read_text())["devices"]) == SHARDS
