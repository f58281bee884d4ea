"""Models in the memory of emulated devices: what programs get of them, for how long, and what they are told."""

import json
import signal
import subprocess
from typing import Any

import pytest

from tests.gpu.conftest import MODELS, TIMEOUT_S, StandIn
from tests.unit.formats.writers import ARRAYS

KINDS = pytest.mark.parametrize("memory", ["vmm", "ipc"])


def told(process: "subprocess.Popen[str]") -> Any:
    """The next that a process tells."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


@KINDS
@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, "GPU"])
def test_tensors_are_those_of_the_file(stand_in: StandIn, device: str | int, memory: str) -> None:
    device = stand_in.kernel.devices[1].uuid if device == "GPU" else device
    code = f"""
model = trimsfs.open(path).to({device!r}, memory={memory!r})
local = trimsfs.open(path).numpy()
arrays = model.numpy()
assert list(arrays) == list(local) == list(model.tensors)
for name, tensor in model.tensors.items():
    assert (arrays[name].dtype, arrays[name].shape) == (local[name].dtype, local[name].shape)
    assert arrays[name].tobytes() == local[name].tobytes()
    assert (tensor.name, tensor.dtype, tensor.shape) == (name, str(local[name].dtype), local[name].shape)
    assert (tensor.address % 256, tensor.nbytes) == (0, local[name].nbytes)
    assert tensor.device_ordinal == model.ordinal
    assert tensor.read_only == ({memory!r} == "vmm")
model.check()
tell([model.device, model.ordinal, model.generation, model.format])
"""
    ordinal = 0 if device in {0, "cuda"} else 1
    uuid = stand_in.kernel.devices[ordinal].uuid
    assert stand_in.run(code) == [[uuid, ordinal, "of model.safetensors", "safetensors"]]


def test_the_file_is_neither_mapped_nor_read(stand_in: StandIn) -> None:
    code = """
model = trimsfs.open(path)
there = model.to("cuda")
import pathlib
tell([path in pathlib.Path("/proc/self/maps").read_text(), "trimsfs.formats.safetensors" in sys.modules])
"""
    assert stand_in.run(code) == [[False, False]]


def test_a_file_of_unknown_format_is_an_image(stand_in: StandIn) -> None:
    code = """
model = trimsfs.open(path).to(0)
tell([model.format, list(model.tensors), model.image.numpy().tobytes().decode(), model.image.shape])
"""
    content = MODELS["notes.txt"].decode()
    assert stand_in.run(code, "notes.txt") == [[None, [], content, [len(content)]]]


def test_parts_are_had_by_patterns(stand_in: StandIn) -> None:
    code = """
for tensors in ("net.*", "a/b%*", ["half", "net.*"], ("none*",)):
    model = trimsfs.open(path).to("cuda", tensors)
    tell([sorted(model.numpy()), leases()])
try:
    trimsfs.open(path).to("cuda", ["half", "net.*"]).image
except GpuError as error:
    tell(str(error))
for wrong in ("", [], "a\\0"):
    try:
        trimsfs.open(path).to("cuda", wrong)
    except ValueError as error:
        tell("wrong")
"""
    net = sorted(name for name in ARRAYS if name.startswith("net."))
    *parts, error, one, two, three = stand_in.run(code)
    assert parts == [[net, 1], [["a/b%c"], 1], [["half", *net], 2], [[], 1]]
    assert "2 patterns were asked for" in error
    assert {one, two, three} == {"wrong"}


@KINDS
def test_the_last_tensor_gives_the_lease_and_the_memory_back(stand_in: StandIn, memory: str) -> None:
    code = f"""
model = trimsfs.open(path).to("cuda", memory={memory!r})
again = trimsfs.open(path).to("cuda", memory={memory!r})
same = model.tensors["half"].address == again.tensors["half"].address
tell([leases(), same])
del again
tensor = model.tensors["half"]
capsule = model.tensors["net.bias"].__dlpack__()
raw = model.tensors["net.weight"].raw()
del model
gc.collect()
before = tensor.numpy().tobytes(), raw.numpy().tobytes()
tell(leases())
input()
del tensor, raw
gc.collect()
tell(leases())
input()
del capsule
tell(leases())
input()
"""
    with stand_in.start(code) as process:
        try:
            assert told(process) == [2, memory == "ipc"]  # a handle that is opened again leads to the same place
            for leases, mapped in [(1, True), (1, True), (0, False)]:
                assert told(process) == leases
                assert (stand_in.mappings() > 0) == mapped
                print(file=process.stdin, flush=True)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def test_a_program_that_is_killed_gives_all_back(stand_in: StandIn) -> None:
    with stand_in.start("model = trimsfs.open(path).to('cuda'); tell(leases()); input()") as process:
        assert told(process) == 1
        assert stand_in.mappings() > 0
        process.kill()
    assert stand_in.mappings() == 0


def test_a_program_may_end_with_all_it_has(stand_in: StandIn) -> None:
    code = """
model = trimsfs.open(path).to("cuda")
capsule = model.tensors["half"].__dlpack__(max_version=(1, 0))
loop = [model]
loop.append(loop)
sys.kept = model.tensors["half"]
"""
    assert stand_in.run(code) == []
    assert stand_in.mappings() == 0


def test_any_thread_may_give_it_back(stand_in: StandIn) -> None:
    code = """
import threading
for memory in ("vmm", "ipc"):
    models = [trimsfs.open(path).to("cuda", memory=memory)]
    thread = threading.Thread(target=models.clear)
    thread.start()
    thread.join()
    tell(leases())

def use():
    for _ in range(20):
        assert trimsfs.open(path).to("cuda").tensors["half"].numpy().shape == (4,)

threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
tell(leases())
"""
    assert stand_in.run(code) == [0, 0, 0]


def test_a_write_faults_or_is_seen_by_all(stand_in: StandIn) -> None:
    code = """
model = trimsfs.open(path).to("cuda", memory=MEMORY)
with cuda.Context(0):
    try:
        cuda.call("cuMemsetD8", model.tensors["half"].address, 1, 8)
        cuda.synchronize()
        tell("written")
    except cuda.CudaError as error:
        tell(error.name)
"""
    assert stand_in.run("MEMORY = 'vmm'" + code) == ["CUDA_ERROR_ILLEGAL_ADDRESS"]
    assert stand_in.run("MEMORY = 'ipc'" + code) == ["written"]
    look = "tell(trimsfs.open(path).to('cuda', memory=MEMORY).tensors['half'].numpy().tobytes().hex())"
    assert stand_in.run(f"MEMORY = 'vmm'; {look}") == [ARRAYS["half"].data.hex()]
    assert stand_in.run(f"MEMORY = 'ipc'; {look}") == ["01" * 8]


def test_a_forked_child_lets_go_and_takes_nothing_away(stand_in: StandIn) -> None:
    code = """
model = trimsfs.open(path).to("cuda")
capsule = model.tensors["half"].__dlpack__()
child = os.fork()
if child == 0:
    told = [leases()]
    for use in (model.check, lambda: trimsfs.open(path).to("cuda")):
        try:
            use()
        except GpuError as error:
            told.append([type(error).__name__, str(error)])
    del model, capsule
    gc.collect()
    tell(told)
    sys.exit()
os.waitpid(child, 0)
model.check()
tell([leases(), model.tensors["half"].numpy().tobytes().hex()])
"""
    (leases, lost, forked), parent = stand_in.run(code)
    assert leases == 0
    assert lost[0] == "GpuLostError"
    assert "this process was forked from the one that has it" in lost[1]
    assert "CUDA does not survive a fork" in forked[1]
    assert parent == [1, ARRAYS["half"].data.hex()]


def test_nothing_of_it_can_be_sent_to_another_process(stand_in: StandIn) -> None:
    code = """
import copy, pickle
model = trimsfs.open(path).to("cuda")
for each in (model, model.tensors["half"], model.image):
    for function in (pickle.dumps, copy.deepcopy):
        try:
            function(each)
        except TypeError as error:
            tell("open the model there" in str(error))
"""
    assert stand_in.run(code) == [True] * 6


def test_a_token_that_is_of_no_use_any_more_is_asked_for_again(stand_in: StandIn) -> None:
    code = """
from trimsfs.client.gpu.leases import Lease
offer = Lease.offer
def once(lease):
    told = offer(lease)
    tell(told.token)
    input()
    return told
Lease.offer = once
tell(trimsfs.open(path).to("cuda").tensors["half"].numpy().tolist())
"""
    with stand_in.start(code) as process:
        try:
            first = told(process)
            stand_in.replace()
            print(file=process.stdin, flush=True)
            second = told(process)
            print(file=process.stdin, flush=True)
            assert told(process) == [1, 2, 3, 4]
        finally:
            process.kill()
    assert first != second


def test_whoever_maps_memory_keeps_it_when_the_server_dies_and_by_a_handle_does_not(stand_in: StandIn) -> None:
    code = """
mapped = trimsfs.open(path).to("cuda")
opened = trimsfs.open(path).to("cuda", memory="ipc")
tell("ready")
input()
tell(mapped.tensors["half"].numpy().tolist())
try:
    tell(opened.tensors["half"].numpy().tolist())
except GpuError as error:
    tell("lost")
"""
    with stand_in.start(code) as process:
        try:
            assert told(process) == "ready"
            stand_in.process.send_signal(signal.SIGKILL)
            stand_in.process.wait(TIMEOUT_S)
            print(file=process.stdin, flush=True)
            assert told(process) == [1, 2, 3, 4]
            assert told(process) != [1, 2, 3, 4]
        finally:
            process.kill()
