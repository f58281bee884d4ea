"""Copies on a GPU by path: every way to one leads to the same bytes, and only for who may have them."""

import errno
import json
import os
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import xattr

from tests.gpu.scene import MIB, Program, Scene, digest_of, scene
from tests.support.mounts import wait_until

SIZE = 5 * MIB + 12_345
OTHER_USER = 4711


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    for name in ("net.bin", "other.bin"):
        (store / name).write_bytes(random.Random(name).randbytes(SIZE))
    (store / "secret.bin").write_bytes(random.Random(1).randbytes(100_000))
    return store


def by_handle(scene: Scene, way: str, name: str = "net.bin") -> Program:
    """A program that uses the legacy copy of a file, having come by it in some way."""
    program = scene.program()
    ways: dict[str, dict[str, Any]] = {
        "control file": {"do": "control_file", "path": scene.control_file(name, f"{scene.device}.ipc")},
        "ioctl": {"do": "ioctl", "path": str(scene.file(name)), "device": scene.device, "memory": 1},
        "xattr": {
            "do": "xattr",
            "path": str(scene.file(name)),
            "device": scene.device,
            "size": 6 * MIB,
            "nbytes": SIZE,
        },
    }
    answer = program.ask(**ways[way])
    assert "error" not in answer, answer
    return program


def test_two_processes_see_the_same_bytes_by_every_way(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        programs = [by_handle(host, way) for way in ("control file", "ioctl", "xattr") for _ in range(2)]
        legacy = len(host.kernel.devices[0].allocations())
        programs += [host.borrowing("net.bin") for _ in range(2)]
        for _ in range(2):
            programs.append(host.program())
            told = programs[-1].ask("ioctl", path=str(host.file("net.bin")), device=host.device, memory=0)
            assert "error" not in told, told

        assert {program.digest() for program in programs} == {digest_of(store, "net.bin")}
        assert legacy == 1
        assert len(host.kernel.devices[0].allocations()) == 2  # one to be mapped, one to be opened by handle
        assert host.kernel.devices[0].bytes_to_device == 2 * SIZE
        assert host.counted("loads_total") == 2
        assert host.leases() == 8  # an attribute gives none
        programs[0].kill()
        assert {program.digest() for program in programs[1:]} == {digest_of(store, "net.bin")}


def test_sixteen_programs_at_once_load_once(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host, ThreadPoolExecutor(16) as threads:
        path = host.control_file("net.bin")
        descriptors = list(threads.map(lambda _: os.open(path, os.O_RDONLY), range(16)))
        told = [json.loads(os.read(descriptor, 1 << 16)) for descriptor in descriptors]

        assert host.counted("loads_total") == 1
        assert host.counted("hits_total") == 15
        assert host.leases() == 16
        assert host.kernel.devices[0].bytes_to_device == SIZE
        assert len({one["token"] for one in told}) == 16
        for descriptor in descriptors:
            os.close(descriptor)
        wait_until(lambda: host.leases() == 0)


def test_a_lease_ends_with_its_program_however_that_ends(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        killed, closing = host.borrowing("net.bin"), host.borrowing("net.bin")
        holding = host.program()
        told = holding.ask("control_file", path=host.control_file("net.bin"), use=False)
        answer = holding.ask(
            "socket", device=host.device, address=told["socket"], token=told["token"], nbytes=SIZE, keep=True
        )
        assert answer["size"] == told["size"]
        assert host.leases() == 4  # a connection is one as well
        killed.kill()
        wait_until(lambda: host.leases() == 3)
        closing.ask("close")
        wait_until(lambda: host.leases() == 2)
        holding.kill()
        wait_until(lambda: host.leases() == 0)


def test_a_write_to_a_mapped_copy_faults(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program, storing = host.borrowing("net.bin"), host.program(transparent=True)
        assert program.ask("write")["name"] in {"CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_INVALID_VALUE"}
        storing.ask("control_file", path=host.control_file("net.bin"))
        storing.tell("store")

        assert storing.wait() == -11
        assert host.borrowing("net.bin").digest() == digest_of(store, "net.bin")


def test_an_attribute_is_there_when_the_copy_is(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        name = f"user.trims.gpu.{host.device}.ipc_handle"
        with pytest.raises(OSError, match="No data available"):
            xattr.getxattr(host.file("net.bin"), name)
        host.borrowing("net.bin")  # to be mapped: it has no handle
        with pytest.raises(OSError, match="No data available"):
            xattr.getxattr(host.file("net.bin"), name)
        by_handle(host, "control file")
        assert len(xattr.getxattr(host.file("net.bin"), name)) == 64
        assert name not in xattr.listxattr(host.file("net.bin"))


def test_a_signal_ends_the_wait_for_a_copy_that_nobody_else_wants(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.program()
        with host.kernel.devices[0].paused():
            program.tell("control_file", path=host.control_file("net.bin"))
            wait_until(lambda: [copy["state"] for copy in host.copies()] == ["loading"])
            program.kill()
            wait_until(lambda: host.copies() == [])  # after a moment, in which another could have asked for it
        wait_until(lambda: host.kernel.devices[0].used == host.counted("used_bytes") == 0)

        assert host.borrowing("net.bin").digest() == digest_of(store, "net.bin")


# Who may have a copy


def another(host: Scene) -> Program:
    program = host.program()
    program.ask("become", uid=OTHER_USER)
    return program


@pytest.mark.parametrize(("sharing", "copies"), [("all", 1), ("uid", 2), ("none", 3)])
def test_copies_are_shared_inside_a_domain_of_trust(store: Path, tmp_path: Path, sharing: str, copies: int) -> None:
    with scene(store, tmp_path, f"gpu_sharing={sharing}") as host:
        programs = [host.borrowing("net.bin"), host.borrowing("net.bin"), another(host)]
        programs[-1].ask("control_file", path=host.control_file("net.bin"))

        assert {program.digest() for program in programs} == {digest_of(store, "net.bin")}
        assert len(host.copies()) == len(host.kernel.devices[0].allocations()) == copies


def test_another_user_gets_no_handle_by_any_way(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        mine = by_handle(host, "control file")
        lent = host.program().ask("control_file", path=host.control_file("net.bin"), use=False)
        stranger = another(host)

        by_attribute = stranger.ask("xattr", path=str(host.file("net.bin")), device=host.device, size=1, nbytes=1)
        assert by_attribute["errno"] == errno.ENODATA
        by_token = stranger.ask("socket", device=host.device, address=lent["socket"], token=lent["token"], nbytes=SIZE)
        assert by_token["kind"] == "NotPermittedError"
        theirs = stranger.ask("control_file", path=host.control_file("net.bin", f"{host.device}.ipc"))
        assert theirs["ipc_handle"] != mine.ask("again")["ipc_handle"]
        by_ioctl = another(host)
        by_ioctl.ask("ioctl", path=str(host.file("net.bin")), device=host.device, memory=1)
        legacy = [copy for copy in host.copies() if copy["memory"] == "ipc"]
        assert {copy["domain"]: copy["leased"] for copy in legacy} == {"uid 0": 1, f"uid {OTHER_USER}": 2}


def test_who_may_not_read_a_file_gets_no_copy_of_it(store: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('gpu_sharing = "all"\n[[access]]\npath = "secret.bin"\nmode = "0400"\n')
    with scene(store, tmp_path, "--config", str(rules)) as host:
        by_handle(host, "control file", "secret.bin")
        stranger = another(host)
        asked = {"path": str(host.file("secret.bin")), "device": host.device}
        answers = [
            stranger.ask("control_file", path=host.control_file("secret.bin")),
            stranger.ask("control_file", path=host.control_file("secret.bin", f"{host.device}.ipc")),
            stranger.ask("ioctl", **asked, memory=1),
            stranger.ask("xattr", **asked, size=1, nbytes=1),
        ]
        assert [answer["errno"] for answer in answers] == [errno.EACCES] * 4


def test_who_connects_without_a_token_gets_nothing(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.borrowing("net.bin")
        for sent in (b'{"token": "guess"}', b"{}", b"[]", b"no json", b'{"token": ["a"]}', b"\xff" * 5000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
                end.settimeout(20)
                end.connect(host.mount.control()["gpu"]["socket"])
                socket.send_fds(end, [sent], [0, 1, 2])
                data, descriptors, _, _ = socket.recv_fds(end, 4096, 4)
            assert not descriptors, sent
            assert not data or json.loads(data)["kind"] == "NoSuchEntryError", sent
            assert program.digest() == digest_of(store, "net.bin"), sent


def test_a_token_is_worth_nothing_once_its_lease_has_ended(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        holder, late = host.borrowing("net.bin"), host.program()
        told = holder.ask("again")
        holder.ask("close")
        wait_until(lambda: host.leases() == 0)
        given = {"device": host.device, "address": told["socket"], "token": told["token"], "nbytes": SIZE}
        assert late.ask("socket", **given)["kind"] == "NoSuchEntryError"
