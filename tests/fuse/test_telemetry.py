"""Metrics and traces of a real mount: `trimsfs trace` as people use it, and a real receiver of OTLP."""

import errno
import itertools
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.http_server import Server
from tests.support.keepers import kill
from tests.support.mounts import TRIMSFS, MountedStore, mounted, trimsfs, wait_until
from tests.support.users import STRANGER, as_user
from trimsfs.control.metrics import labelled
from trimsfs.extras.tracing.trace import covered_s

SHARDS = 3
MODEL = "llama"


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount of a sharded model, whose shards have been opened in a row; each open waited until its shard was here."""
    store = tmp_path_factory.mktemp("store")
    (store / MODEL).mkdir()
    for number in range(SHARDS):
        (store / MODEL / f"{number}.safetensors").write_bytes(os.urandom(20 << 20))
    (store / "alone.params").write_bytes(os.urandom(1 << 20))
    with mounted(store, tmp_path_factory.mktemp("mount"), "--cold-open", "wait", "--prefetch", "off") as mount:
        for path in shards(mount):
            path.open("rb").close()
        yield mount


def shards(mount: MountedStore) -> list[Path]:
    return [mount.path / MODEL / f"{number}.safetensors" for number in range(SHARDS)]


def traces(mount: MountedStore, *arguments: str | Path) -> list[dict[str, Any]]:
    done = trimsfs("trace", mount.path, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.alone  # measures time
def test_spans_explain_the_cold_opens_of_a_sharded_model(mount: MountedStore) -> None:
    found = [trace for trace in traces(mount) if MODEL in trace["path"]]
    assert [trace["path"] for trace in found] == list(map(str, shards(mount)))
    for trace in found:
        names = {span["name"] for span in trace["spans"]}
        assert {"request", "record", "announce"} <= names
        parts = [part["name"] for span in trace["spans"] for part in span.get("parts", ())]
        assert parts[:4] == ["first byte", "receive", "checksum", "write"]
        assert trace["done"]
    assert sum(covered_s(trace["spans"]) for trace in found) >= 0.95 * sum(trace["duration"] for trace in found)


def test_a_trace_is_drawn_by_chrome(mount: MountedStore, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    assert trimsfs("trace", mount.path / MODEL, "--output", output).returncode == 0
    events = json.loads(output.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == list(map(str, shards(mount)))
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X" and event["name"] not in {"first byte", "receive", "checksum", "write"}:
            lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():  # events of a lane that overlap are not drawn
        assert all(before[1] <= after[0] + 2 for before, after in itertools.pairwise(spans))
    to_pipe = trimsfs("trace", mount.path / MODEL, "--output", "-")
    assert len(json.loads(to_pipe.stdout)["traceEvents"]) == len(events)


def test_the_table_names_what_opens_waited_for(mount: MountedStore) -> None:
    done = trimsfs("trace", mount.path / MODEL)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["PATH", "WHY", "OPEN", "TRACED"]
    assert len(lines) == 1 + SHARDS
    assert all(" store " in line and "request " in line for line in lines[1:])


def test_other_users_read_no_traces(mount: MountedStore) -> None:
    def refusal() -> int | None:
        try:
            (mount.path / ".trims/traces").read_text()
        except OSError as error:
            return error.errno
        return None

    assert as_user(STRANGER, refusal) == errno.EPERM


def test_models_are_counted_and_what_sharing_saves(mount: MountedStore) -> None:
    script = "import sys; file = open(sys.argv[1], 'rb'); print(flush=True); sys.stdin.read()"
    size = 20 << 20
    programs = [
        subprocess.Popen(
            ["python3", "-c", script, shards(mount)[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    try:
        for program in programs:
            assert program.stdout is not None
            assert program.stdout.readline() == "\n"
        with shards(mount)[0].open("rb"), shards(mount)[0].open("rb"):  # two of one process
            found = labelled((mount.path / ".trims/metrics").read_text(), "model")[MODEL]
        assert found["trimsfs_model_saved_bytes"] == 3 * size
        assert found["trimsfs_model_fetched_bytes_total"] == SHARDS * size
    finally:
        for program in programs:
            program.communicate("", timeout=30)
    assert labelled((mount.path / ".trims/metrics").read_text(), "model")[MODEL]["trimsfs_model_saved_bytes"] == 0


# OpenTelemetry


@dataclass
class Receiver:
    """A receiver of OTLP over HTTP: the spans that came, with the attributes of their resources."""

    url: str
    spans: list[tuple[dict[str, str], Span]] = field(default_factory=list)

    def named(self, name: str) -> list[Span]:
        return [span for _, span in self.spans if span.name == name]


@contextmanager
def receiving() -> Iterator[Receiver]:
    def answer(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        sent = ExportTraceServiceRequest.FromString(request.rfile.read(int(request.headers["Content-Length"])))
        assert request.path == "/v1/traces"
        for each in sent.resource_spans:
            resource = {one.key: one.value.string_value for one in each.resource.attributes}
            receiver.spans.extend((resource, span) for scope in each.scope_spans for span in scope.spans)
        return 200, {}, b""

    with Server(answer).running() as server:
        receiver = Receiver(server.url)
        yield receiver


def test_a_path_without_traces_is_told_apart_from_one_that_does_not_exist(mount: MountedStore, tmp_path: Path) -> None:
    unread, missing, output = mount.path / "alone.params", mount.path / "lama", tmp_path / "trace.json"
    done = trimsfs("trace", unread)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no cold opens\n", "")
    done = trimsfs("trace", unread, "--output", output)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no cold opens\n")
    assert json.loads(output.read_text())["traceEvents"] == []
    done = trimsfs("trace", missing, "--output", tmp_path / "other.json")
    assert (done.returncode, done.stderr) == (13, f"trimsfs: {missing}: No such file or directory\n")
    assert not (tmp_path / "other.json").exists()


def test_traces_are_sent_to_a_receiver_of_otlp(mount: MountedStore) -> None:
    with receiving() as receiver:
        done = trimsfs("trace", mount.path / MODEL, "--otlp", receiver.url)
        assert (done.returncode, done.stderr) == (0, "")
    told = {trace["id"]: trace for trace in traces(mount) if MODEL in trace["path"]}
    opens = receiver.named("cold open")
    assert {span.trace_id.hex() for span in opens} == told.keys()
    for span in opens:
        trace = told[span.trace_id.hex()]
        attributes = {one.key: one.value.string_value for one in span.attributes}
        assert attributes["trimsfs.path"] == trace["path"]
        duration_s = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert duration_s == pytest.approx(trace["duration"], abs=1e-6)
        below = [other for _, other in receiver.spans if other.parent_span_id == span.span_id]
        assert sorted(other.name for other in below) == sorted(one["name"] for one in trace["spans"])
        assert all(other.trace_id == span.trace_id for other in below)
        requests = {other.span_id for other in below if other.name == "request"}
        writes = [one for one in receiver.named("write") if one.trace_id == span.trace_id]
        assert {one.parent_span_id for one in writes} == requests
    assert {resource["service.name"] for resource, _ in receiver.spans} == {"trimsfs"}
    assert {resource["trimsfs.mountpoint"] for resource, _ in receiver.spans} == {str(mount.path)}


def test_who_follows_sends_each_open_once(mount: MountedStore) -> None:
    with receiving() as receiver:
        command = [TRIMSFS, "trace", str(mount.path), "--otlp", receiver.url, "--follow"]
        follower = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: len(receiver.named("cold open")) >= SHARDS)
            (mount.path / "alone.params").open("rb").close()
            alone = str(mount.path / "alone.params")
            wait_until(lambda: any(_path(span) == alone for span in receiver.named("cold open")))
        finally:
            follower.send_signal(signal.SIGINT)
            _, errors = follower.communicate(timeout=30)
        assert (follower.returncode, errors) == (130, "trimsfs: interrupted\n")
        ids = [span.trace_id for span in receiver.named("cold open")]
        assert len(ids) == len(set(ids))


def _path(span: Span) -> str:
    return next(one.value.string_value for one in span.attributes if one.key == "trimsfs.path")


def test_a_receiver_that_is_none_is_told_in_one_line(mount: MountedStore) -> None:
    done = trimsfs("trace", mount.path, "--otlp", "127.0.0.1:4318")
    assert (done.returncode, done.stderr) == (
        2,
        "trimsfs: --otlp 127.0.0.1:4318: not a URL, as http://127.0.0.1:4318\n",
    )
    assert trimsfs("trace", mount.path, "--follow").returncode == 2
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        short = {"OTEL_EXPORTER_OTLP_TIMEOUT": "3"}  # enough for one more attempt
        done = trimsfs("trace", mount.path / MODEL, "--otlp", url, environment=short)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"trimsfs: {url}/v1/traces: {SHARDS} traces not sent: Connection refused: does a receiver listen there\?\n",
        done.stderr,
    )


def test_a_file_that_cannot_be_written_is_told_in_one_line(mount: MountedStore) -> None:
    done = trimsfs("trace", mount.path, "--output", "/nonexistent/traces.json")
    assert done.returncode == 2
    assert re.fullmatch(r"trimsfs: --output /nonexistent/traces.json: No such file.+: name another file\n", done.stderr)


# Takeover


def test_a_takeover_is_timed_from_the_end_of_the_server_before(mount: MountedStore) -> None:
    count, seconds = "trimsfs_server_takeover_seconds_count", "trimsfs_server_takeover_seconds_sum"
    before = mount.metrics()
    assert before[count] == 0
    kill(mount)
    after = mount.metrics()
    assert after[count] == 1
    assert 0 < after[seconds] < 30
