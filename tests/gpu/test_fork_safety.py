"""Forks while other threads take leases and give them back: a child keeps none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.mount import ROOT, TIMEOUT_S, GpuMount

PREAMBLE = """
import json, os, sys, threading, time, warnings
from pathlib import Path
from trimsfs.extras.gpu.client import fork_safety
warnings.simplefilter("ignore")  # of forks of a process that has threads
path = Path(sys.argv[1])

def held():
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return [link for link in links if link == str(path)]

def in_child(function):
    received, sent = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(sent, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(sent)
    with open(received, "rb") as file:
        told = json.load(file)
    os.waitpid(child, 0)
    return told"""


def run(code: str, path: Path) -> object:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def lease(tmp_path: Path) -> Path:
    path = tmp_path / "GPU-0"
    path.write_text("{}")
    return path


def test_a_child_closes_what_another_thread_has_just_opened(lease: Path) -> None:
    code = """
opened, go_on, really = threading.Event(), threading.Event(), os.open
def slowly(*arguments):
    descriptor = really(*arguments)
    opened.set()
    go_on.wait()
    return descriptor
os.open = slowly
thread = threading.Thread(target=fork_safety.open_file, args=(path,))
thread.start()
opened.wait()
told = [held(), in_child(held)]
go_on.set()
thread.join()
print(json.dumps(told))
"""
    assert run(code, lease) == [[str(lease)], []]


def test_an_open_that_waits_keeps_nobody_from_forking(tmp_path: Path) -> None:
    path = tmp_path / "GPU-0"
    os.mkfifo(path)
    code = """
thread = threading.Thread(target=fork_safety.open_file, args=(path,))
thread.start()
told = in_child(held)
with open(path, "wb"):
    thread.join()
print(json.dumps(told))
"""
    assert run(code, path) == []


def test_a_finalizer_may_close_one_while_another_is_closed(lease: Path) -> None:
    code = """
with fork_safety.guard:
    fork_safety.open_file(path).close()
    told = in_child(held)
print(json.dumps(told))
"""
    assert run(code, lease) == []


def test_children_keep_no_lease_no_connection_and_no_memory(gpu_mount: GpuMount) -> None:
    code = """
import threading, time, warnings
warnings.simplefilter("ignore")
end = time.monotonic() + 3

def use():
    while time.monotonic() < end:
        trimsfs.open(path).to("cuda")

def kept():
    told = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return [each for each in told if "/gpu/GPU-" in each or each in memory]

first = trimsfs.open(path).to("cuda")
memory = set()
from trimsfs.extras.gpu.client import descriptor_client
receive = descriptor_client.receive
def observed(*arguments):
    descriptor, size = receive(*arguments)
    memory.add(os.path.realpath(f"/proc/self/fd/{descriptor.number}"))
    return descriptor, size
descriptor_client.receive = observed
threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
wrong, children = 0, 0
while time.monotonic() < end:
    child = os.fork()
    if child == 0:
        try:
            os._exit(len(kept()))
        finally:
            os._exit(99)
    wrong += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    children += 1
for thread in threads:
    thread.join()
first.check()
tell([wrong, children > 20, len(memory) > 0])
"""
    assert gpu_mount.run(code) == [[0, True, True]]
