"""Copies on a GPU by path: every way to one leads to the same bytes, and only for who may have them."""

import errno
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import xattr

from tests.gpu.scene import MIB, NOWHERE, OTHER_USER, SIZE, Program, Scene, digest_of, scene
from tests.support.mounts import wait_until


def by_handle(host: Scene, way: str, name: str = "net.bin") -> Program:
    """A program that uses the legacy copy of a file, having come by it in some way."""
    file = {"path": str(host.file(name)), "device": host.device}
    ways: dict[str, dict[str, Any]] = {
        "control file": {"do": "control_file", "path": host.control_file(name, f"{host.device}.ipc")},
        "ioctl": {"do": "ioctl", **file, "memory": 1},
        "xattr": {"do": "xattr", **file, "size": 6 * MIB, "nbytes": SIZE},
    }
    program = host.program()
    answer = program.ask(**ways[way])
    assert "error" not in answer, answer
    return program


def test_two_processes_see_the_same_bytes_by_every_way(host: Scene, store: Path) -> None:
    programs = [by_handle(host, way) for way in ("control file", "ioctl", "xattr") for _ in range(2)]
    legacy = len(host.kernel.devices[0].allocations())
    programs += [host.borrowing() for _ in range(2)]
    for _ in range(2):
        programs.append(host.program())
        told = programs[-1].ask("ioctl", path=str(host.file("net.bin")), device=host.device, memory=0)
        assert "error" not in told, told

    assert {program.digest() for program in programs} == {digest_of(store)}
    assert legacy == 1
    assert len(host.kernel.devices[0].allocations()) == 2  # one to be mapped, one to be opened by handle
    assert host.kernel.devices[0].bytes_to_device == 2 * SIZE
    assert host.counted("loads_total") == 2
    assert host.leases() == 8  # an attribute gives none
    programs[0].kill()
    assert {program.digest() for program in programs[1:]} == {digest_of(store)}


def test_sixteen_programs_at_once_load_once(host: Scene) -> None:
    path = host.control_file()
    with ThreadPoolExecutor(16) as threads:
        descriptors = list(threads.map(lambda _: os.open(path, os.O_RDONLY), range(16)))
    told = [json.loads(os.read(descriptor, 1 << 16)) for descriptor in descriptors]

    assert (host.counted("loads_total"), host.counted("hits_total"), host.leases()) == (1, 15, 16)
    assert host.kernel.devices[0].bytes_to_device == SIZE
    assert len({one["token"] for one in told}) == 16
    for descriptor in descriptors:
        os.close(descriptor)
    wait_until(lambda: host.leases() == 0)


def test_a_lease_ends_with_its_program_however_that_ends(host: Scene) -> None:
    killed, closing, holding, late = host.borrowing(), host.borrowing(), host.program(), host.program()
    told = holding.ask("control_file", path=host.control_file(), use=False)
    given = {"device": host.device, "address": told["socket"], "nbytes": SIZE}
    assert holding.ask("socket", **given, token=told["token"], keep=True)["size"] == told["size"]
    assert host.leases() == 4  # a connection is one as well
    killed.kill()
    wait_until(lambda: host.leases() == 3)
    token = closing.ask("again")["token"]
    closing.ask("close")
    wait_until(lambda: host.leases() == 2)
    assert late.ask("socket", **given, token=token)["kind"] == "NoSuchEntryError"
    holding.kill()
    wait_until(lambda: host.leases() == 0)


def test_a_write_to_a_mapped_copy_faults(host: Scene, store: Path) -> None:
    program, storing = host.borrowing(), host.program(transparent=True)
    assert program.ask("write")["name"] in {"CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_INVALID_VALUE"}
    storing.ask("control_file", path=host.control_file())
    storing.tell("store")

    assert storing.wait() == -11
    assert host.borrowing().digest() == digest_of(store)


def test_a_write_to_a_copy_that_is_opened_by_handle_is_seen_by_all(host: Scene, store: Path) -> None:
    one, other = by_handle(host, "control file"), by_handle(host, "ioctl")
    assert one.ask("write") == {}
    assert one.digest() == other.digest() != digest_of(store)
    assert host.borrowing().digest() == digest_of(store)


def test_an_attribute_is_there_when_the_copy_is(host: Scene) -> None:
    name, file = f"user.trims.gpu.{host.device}.ipc_handle", host.file("net.bin")
    host.borrowing()  # to be mapped: it has no handle
    with pytest.raises(OSError, match="No data available"):
        xattr.getxattr(file, name)
    by_handle(host, "control file")
    assert len(xattr.getxattr(file, name)) == 64
    assert name not in xattr.listxattr(file)


def test_a_signal_ends_the_wait_for_a_copy_that_nobody_else_wants(host: Scene, store: Path) -> None:
    program = host.program()
    with host.kernel.devices[0].paused():
        program.tell("control_file", path=host.control_file())
        host.wait_until_loading()
        program.kill()
        wait_until(lambda: host.copies() == [])  # after a moment, in which another could have asked for it
    wait_until(lambda: host.kernel.devices[0].used == host.counted("used_bytes") == 0)

    assert host.borrowing().digest() == digest_of(store)


def test_a_copy_of_what_there_is_not(host: Scene, store: Path) -> None:
    for asked in (NOWHERE, "GPU-0", f"{host.device}@layer.*"):  # no tensors are known in the file
        assert host.refused(asked=asked) == errno.ENOENT
    file = str(host.file("net.bin"))
    assert host.program().ask("ioctl", path=file, device=NOWHERE, memory=0)["errno"] == errno.ENOENT
    assert host.program().ask("ioctl", path=file, device=host.device, memory=7)["errno"] == errno.EINVAL
    (store / "empty.bin").touch()
    wait_until(host.file("empty.bin").exists)
    assert host.borrowing("empty.bin").ask("again")["nbytes"] == 0


# Who may have a copy


@pytest.mark.parametrize(("sharing", "copies"), [("all", 1), ("uid", 2), ("none", 3)])
def test_copies_are_shared_inside_a_domain_of_trust(store: Path, tmp_path: Path, sharing: str, copies: int) -> None:
    with scene(store, tmp_path, f"gpu_sharing={sharing}") as host:
        programs = [host.borrowing(), host.borrowing(), host.another_user()]
        programs[-1].ask("control_file", path=host.control_file())

        assert {program.digest() for program in programs} == {digest_of(store)}
        assert len(host.copies()) == len(host.kernel.devices[0].allocations()) == copies


def test_another_user_gets_no_handle_by_any_way(host: Scene) -> None:
    mine = by_handle(host, "control file")
    lent = host.program().ask("control_file", path=host.control_file(), use=False)
    stranger = host.another_user()

    file = {"path": str(host.file("net.bin")), "device": host.device}
    assert stranger.ask("xattr", **file, size=1, nbytes=1)["errno"] == errno.ENODATA
    by_token = stranger.ask("socket", device=host.device, address=lent["socket"], token=lent["token"], nbytes=SIZE)
    assert by_token["kind"] == "NotPermittedError"
    theirs = stranger.ask("control_file", path=host.control_file("net.bin", f"{host.device}.ipc"))
    assert theirs["ipc_handle"] != mine.ask("again")["ipc_handle"]
    by_ioctl = host.another_user()
    by_ioctl.ask("ioctl", **file, memory=1)
    legacy = [copy for copy in host.copies() if copy["memory"] == "ipc"]
    assert {copy["domain"]: copy["leased"] for copy in legacy} == {"uid 0": 1, f"uid {OTHER_USER}": 2}


def test_who_may_not_read_a_file_gets_no_copy_of_it(store: Path, tmp_path: Path) -> None:
    (store / "secret.bin").write_bytes(random.Random(1).randbytes(100_000))
    rules = tmp_path / "rules.toml"
    rules.write_text('gpu_sharing = "all"\n[[access]]\npath = "secret.bin"\nmode = "0400"\n')
    with scene(store, tmp_path, "--config", str(rules)) as host:
        by_handle(host, "control file", "secret.bin")
        stranger = host.another_user()
        asked = {"path": str(host.file("secret.bin")), "device": host.device}
        answers = [
            stranger.ask("control_file", path=host.control_file("secret.bin")),
            stranger.ask("control_file", path=host.control_file("secret.bin", f"{host.device}.ipc")),
            stranger.ask("ioctl", **asked, memory=1),
            stranger.ask("xattr", **asked, size=1, nbytes=1),
        ]
        assert [answer["errno"] for answer in answers] == [errno.EACCES] * 4
