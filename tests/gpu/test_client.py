"""Models in the memory of emulated devices: what programs get of them, for how long, and what they are told."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.mount import MODELS, TIMEOUT_S, GpuMount
from tests.support.model_files import ARRAYS
from tests.support.mounts import wait_until

KINDS = pytest.mark.parametrize("memory", ["vmm", "ipc"])


def told(process: "subprocess.Popen[str]") -> Any:
    """The next that a process tells."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


@KINDS
@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, "GPU"])
def test_tensors_are_those_of_the_file(gpu_mount: GpuMount, device: str | int, memory: str) -> None:
    device = gpu_mount.uuid(1) if device == "GPU" else device
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
generation = os.getxattr(path, "user.trims.generation").decode()
tell([model.device, model.ordinal, model.generation == generation, model.format])
"""
    ordinal = 0 if device in {0, "cuda"} else 1
    uuid = gpu_mount.uuid(ordinal)
    assert gpu_mount.run(code) == [[uuid, ordinal, True, "safetensors"]]


def test_the_file_is_neither_mapped_nor_read(gpu_mount: GpuMount) -> None:
    code = """
model = trimsfs.open(path)
there = model.to("cuda")
import pathlib
tell([path in pathlib.Path("/proc/self/maps").read_text(), "trimsfs.formats.safetensors" in sys.modules])
"""
    assert gpu_mount.run(code) == [[False, False]]


def test_the_shards_of_a_directory_are_one_model(gpu_mount: GpuMount) -> None:
    code = """
model = trimsfs.open(path)
there, local = model.to("cuda"), model.numpy()
tell({name: array.tobytes() == local[name].tobytes() for name, array in there.numpy().items()})
tell([there.generation.count(","), leases()])
try:
    there.image
except GpuError as error:
    tell(str(error))
del there
for tensors in ("*.weight", ["half", "net.*"]):
    part = model.to("cuda", tensors)
    tell([sorted(part.tensors), leases()])
try:
    model.to("cuda", "none*")
except LookupError as error:
    tell(str(error))
"""
    equal, whole, image, *parts, absent = gpu_mount.run(code, "sharded")
    path = gpu_mount.mount.path / "sharded"
    assert equal == dict.fromkeys(ARRAYS, True)
    assert whole == [1, 2]
    assert image.startswith(f"{path}: it has 2 copies, and each has an image of its own")
    assert parts == [[["net.weight"], 1], [sorted(ARRAYS), 3]]
    assert absent == f"{path}: no tensor name matches 'none*'"


def test_a_file_of_unknown_format_is_an_image(gpu_mount: GpuMount) -> None:
    code = """
model = trimsfs.open(path).to(0)
tell([model.format, list(model.tensors), model.image.numpy().tobytes().decode(), model.image.shape])
"""
    content = MODELS["notes.txt"].decode()
    assert gpu_mount.run(code, "notes.txt") == [[None, [], content, [len(content)]]]


def test_a_link_from_elsewhere_leads_to_the_copy(gpu_mount: GpuMount, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(gpu_mount.mount.path / "model.safetensors")
    (tmp_path / "directory").symlink_to(gpu_mount.mount.path)
    for path in (tmp_path / "link", tmp_path / "directory/model.safetensors"):
        code = f"tell(trimsfs.open({str(path)!r}).to('cuda').tensors['half'].numpy().tobytes().hex())"
        assert gpu_mount.run(code) == [ARRAYS["half"].data.hex()]


def test_a_file_that_is_bound_alone_has_no_copy(gpu_mount: GpuMount, tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    bound = ["bwrap", "--die-with-parent", "--dev-bind", "/", "/", "--bind"]
    inside = """
import json, sys, trimsfs
try:
    trimsfs.open(sys.argv[1]).to("cuda")
except trimsfs.GpuError as error:
    print(json.dumps(str(error)))
"""
    place = str(tmp_path / "model")
    code = f"""
import subprocess
sys.exit(subprocess.call([*{bound}, path, {place!r}, sys.executable, "-c", {inside!r}, {place!r}]))
"""
    (told,) = gpu_mount.run(code)
    assert told == f"{place}: only the file is mounted here: bind-mount its directory instead"


def test_what_is_shown_of_it_and_what_is_no_array(gpu_mount: GpuMount) -> None:
    code = """
import numpy
model = trimsfs.open(path).to("cuda")
tensor = model.tensors["half"]
tell([repr(model), repr(tensor)])
for make in (numpy.asarray, numpy.array, lambda tensor: numpy.zeros(4) + tensor):
    try:
        make(tensor)
    except TypeError as error:
        tell(str(error))
"""
    shown, *errors = gpu_mount.run(code)
    path = gpu_mount.mount.path / "model.safetensors"
    assert shown[0] == f"DeviceModel({str(path)!r}, {len(ARRAYS) + 1} tensors, {gpu_mount.uuid(0)})"
    assert shown[1].startswith("DeviceTensor('half', float16, [4], cuda:0, 0x")
    assert errors == ["tensor 'half' is in a device's memory: numpy() copies it to the host"] * 3


def test_parts_are_had_by_patterns(gpu_mount: GpuMount) -> None:
    code = """
for tensors in ("net.*", "a/b%*", ["half", "net.*"]):
    model = trimsfs.open(path).to("cuda", tensors)
    tell([sorted(model.numpy()), leases()])
try:
    trimsfs.open(path).to("cuda", ["half", "net.*"]).image
except GpuError as error:
    tell(str(error))
del model
for absent in ("none*", ["half", "none*"]):
    try:
        trimsfs.open(path).to("cuda", absent)
    except GpuError as error:
        tell([str(error), leases()])
for wrong in ("", [], "a\\0"):
    try:
        trimsfs.open(path).to("cuda", wrong)
    except ValueError as error:
        tell("wrong")
"""
    net = sorted(name for name in ARRAYS if name.startswith("net."))
    *parts, error, absent, one_absent, one, two, three = gpu_mount.run(code)
    assert parts == [[net, 1], [["a/b%c"], 1], [["half", *net], 2]]
    assert "it has 2 copies" in error
    assert absent == one_absent == [f"{gpu_mount.mount.path}/model.safetensors: no tensor name matches 'none*'", 0]
    assert {one, two, three} == {"wrong"}


@KINDS
def test_the_last_tensor_gives_the_lease_and_the_memory_back(gpu_mount: GpuMount, memory: str) -> None:
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
    with gpu_mount.start(code) as process:
        try:
            assert told(process) == [2, memory == "ipc"]  # a handle that is opened again leads to the same place
            for leases, mapped in [(1, True), (1, True), (0, False)]:
                assert told(process) == leases
                assert (gpu_mount.uses(process), gpu_mount.leases() > 0) == (mapped, mapped)
                print(file=process.stdin, flush=True)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


def test_a_program_may_end_with_all_it_has(gpu_mount: GpuMount) -> None:
    code = """
model = trimsfs.open(path).to("cuda")
capsule = model.tensors["half"].__dlpack__(max_version=(1, 0))
loop = [model]
loop.append(loop)
sys.kept = model.tensors["half"]
"""
    assert gpu_mount.run(code) == []
    wait_until(lambda: gpu_mount.leases() == 0)


def test_any_thread_may_give_it_back(gpu_mount: GpuMount) -> None:
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
    assert gpu_mount.run(code) == [0, 0, 0]


def test_a_forked_child_lets_go_and_takes_nothing_away(gpu_mount: GpuMount) -> None:
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
    (leases, lost, forked), parent = gpu_mount.run(code)
    assert leases == 0
    assert lost[0] == "GpuLostError"
    assert "this process was forked from the lease's holder" in lost[1]
    assert "CUDA does not survive a fork" in forked[1]
    assert parent == [1, ARRAYS["half"].data.hex()]


def test_nothing_of_it_can_be_sent_to_another_process(gpu_mount: GpuMount) -> None:
    code = """
import copy, pickle
model = trimsfs.open(path).to("cuda")
for each in (model, model.tensors["half"], model.image):
    for function in (pickle.dumps, copy.deepcopy):
        try:
            function(each)
        except TypeError as error:
            tell("open the model in the other process" in str(error))
"""
    assert gpu_mount.run(code) == [True] * 6


def test_a_server_that_is_replaced_meanwhile_is_asked_again(gpu_mount: GpuMount) -> None:
    code = """
from trimsfs.extras.gpu.client.copy_leases import Lease
description = Lease.description
def once(lease):
    told = description(lease)
    tell(told.token)
    input()
    return told
Lease.description = once
tell(trimsfs.open(path).to("cuda").tensors["half"].numpy().tolist())
"""
    with gpu_mount.start(code) as process:
        try:
            first = told(process)
            gpu_mount.kill_server()
            print(file=process.stdin, flush=True)
            second = told(process)
            print(file=process.stdin, flush=True)
            assert told(process) == [1, 2, 3, 4]
        finally:
            process.kill()
    assert first != second


def test_shards_of_two_versions_are_not_joined(gpu_mount: GpuMount) -> None:
    """A lease is of what a path leads to, also if the program has had the file open since before."""
    code = """
import errno, pathlib
model = trimsfs.open(path)
model.numpy()
store = pathlib.Path(os.environ["STORE"])
for shard in sorted(store.iterdir()):
    (store.parent / "new").write_bytes(shard.read_bytes())
    (store.parent / "new").replace(shard)
pathlib.Path(path, ".trims/.trims/refresh").read_bytes()
try:
    model.to("cuda")
except OSError as error:
    tell(error.errno == errno.ESTALE)
tell(leases())
tell(sorted(trimsfs.open(path).to("cuda").tensors))
"""
    store = gpu_mount.mount.path.parent / "store/sharded"
    assert gpu_mount.run(code, "sharded", STORE=str(store)) == [True, 0, sorted(ARRAYS)]
