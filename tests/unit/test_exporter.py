"""The exporter without mounts: directories stand in for them, and a pipe that nobody writes for one that hangs."""

import base64
import contextlib
import errno
import gc
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.mounts import wait_until
from trimsfs.errors import ConfigurationError
from trimsfs.extras.exporter.exporter import listen, read_token
from trimsfs.extras.exporter.history import INTERVAL_S, MOST_MOUNTS, SAMPLES, History
from trimsfs.extras.exporter.merged_metrics import merged, parsed
from trimsfs.extras.exporter.mounts import Mounts
from trimsfs.extras.exporter.scraper import LONGEST, Scraper, scrape_forever
from trimsfs.extras.exporter.status_page import MOST_MODELS, status
from trimsfs.extras.exporter.web import MOST_REQUESTS, WebServer
from trimsfs.listen_address import ListenAddress
from trimsfs.mountinfo import Mount
from trimsfs.processes import open_descriptors

TEXT = """\
# HELP trimsfs_files_open_handles Open files.
# TYPE trimsfs_files_open_handles gauge
trimsfs_files_open_handles 3.0
# HELP trimsfs_fetch_fetched_bytes_total Bytes of models that came from the store.
# TYPE trimsfs_fetch_fetched_bytes_total counter
trimsfs_fetch_fetched_bytes_total 1024.0
# HELP trimsfs_files_open_seconds Time that opens took.
# TYPE trimsfs_files_open_seconds histogram
trimsfs_files_open_seconds_bucket{le="1.0",why="store"} 1.0
trimsfs_files_open_seconds_bucket{le="+Inf",why="store"} 2.0
trimsfs_files_open_seconds_count{why="store"} 2.0
trimsfs_files_open_seconds_sum{why="store"} 4.0
"""
HOSTILE = '<img src=x onerror=alert(1)>"\\\n\x1b[31m'
TOKEN = "0123456789abcdef"


def stand_in(directory: Path, name: str, metrics: str | None = TEXT, number: int = 1) -> Mount:
    """A directory with the control files of a mount; without metrics, one that hangs."""
    mountpoint = directory / name
    control = mountpoint / ".trims"
    control.mkdir(parents=True)
    if metrics is None:
        os.mkfifo(control / "metrics")
    else:
        (control / "metrics").write_text(metrics)
    (control / "control").write_text(json.dumps({"version": "1", "store_problem": "no answer"}))
    (control / "models").write_text(json.dumps({"models": [model(f"{HOSTILE}/weights", uses=1)]}))
    return Mount(number=number, parent=1, mountpoint=mountpoint, device=f"0:{number}", kind="fuse.trimsfs", source=name)


def model(path: str, *, uses: int, handles: int = 0) -> dict[str, object]:
    """A file as the control file ``models`` has it."""
    told = {"path": path, "size": 10, "open": handles, "uses": uses, "pinned": False, "last_used": 1.0}
    return told | {"residency": {"disk": 10, "host": 5, "gpu": {}}}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., WebServer]]:
    """Starts a web server over these mounts, in threads."""
    started: list[tuple[WebServer, Connection, int]] = []

    def serve(mounts: list[Mount], token: str | None = None, address: ListenAddress | None = None) -> WebServer:
        ours, others = Pipe()
        scraper = Scraper(5, lambda: mounts)
        pid = os.fork()
        if pid == 0:
            ours.close()
            scrape_forever(others, scraper)
            os._exit(0)
        others.close()
        listener = listen(address or ListenAddress("127.0.0.1", 0))
        assert listener is not None
        server = WebServer(listener, Mounts(ours, whole=token is not None, timeout_s=5), token)
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        started.append((server, ours, pid))
        return server

    yield serve
    for server, ours, pid in started:
        server.shutdown()
        server.server_close()
        ours.close()
        os.waitpid(pid, 0)


def ask(server: WebServer, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
    """A response and its text."""
    connection = HTTPConnection("127.0.0.1", timeout=10)
    if server.socket.family == socket.AF_UNIX:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(server.socket.getsockname())
    else:
        connection.port = server.socket.getsockname()[1]
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read().decode()
    finally:
        connection.close()


def test_every_sample_gets_its_mount_and_a_mount_that_hangs_keeps_none_waiting(tmp_path: Path) -> None:
    mounts = [stand_in(tmp_path, *each) for each in (("a", TEXT, 1), ("hangs", None, 2), ("c", TEXT, 3))]
    scraper = Scraper(2, lambda: mounts)
    started = time.monotonic()
    found = scraper.ask(["metrics"])

    assert time.monotonic() - started < 15
    assert [(Path(one["mountpoint"]).name, one["error"]) for one in found] == [
        ("a", None),
        ("c", None),
        ("hangs", "did not answer in 2 s"),
    ]
    text = merged({one["mountpoint"]: None if one["error"] else parsed(one["answers"]["metrics"]) for one in found})
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    assert all("mountpoint" in str(key) for key in samples)
    up = {str(key[1][1]): value for key, value in samples.items() if key[0] == "trimsfs_up"}
    assert up == {str(tmp_path / "a"): 1, str(tmp_path / "c"): 1, str(tmp_path / "hangs"): 0}
    a, c = (("mountpoint", str(tmp_path / name)) for name in ("a", "c"))
    assert samples["trimsfs_fetch_fetched_bytes_total", c] == 1024
    assert samples["trimsfs_files_open_seconds_bucket", ("le", "+Inf"), a, ("why", "store")] == 2
    assert text.count(b"# TYPE trimsfs_fetch_fetched_bytes_total counter") == 1


def test_a_scrape_waits_for_no_more_than_what_is_asked_for_the_page() -> None:
    """So a mount that hangs keeps a scrape waiting once, and not once for each who asks."""
    ours, scraper = Pipe()
    mounts, told = Mounts(ours, whole=False, timeout_s=5), list[bytes]()
    page = threading.Thread(target=mounts.status, daemon=True)
    page.start()
    assert scraper.recv_bytes() == b"status"
    scrape = threading.Thread(target=lambda: told.append(mounts.metrics()), daemon=True)
    scrape.start()
    time.sleep(0.1)
    result = {"mountpoint": "/m", "store": "s", "error": None, "hidden": False, "answers": {"metrics": TEXT}}
    scraper.send_bytes(json.dumps([result]).encode())
    for thread in (page, scrape):
        thread.join(10)
    assert 'trimsfs_up{mountpoint="/m"} 1.0' in told[0].decode()
    assert not scraper.poll()


def test_a_host_without_room_for_another_process_costs_an_answer_and_not_the_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    mount = stand_in(tmp_path, "a")
    gc.collect()
    scraper, before = Scraper(1, lambda: [mount]), open_descriptors()
    with monkeypatch.context() as short:
        short.setattr(os, "fork", fork)
        [told] = scraper.ask(["metrics"])
    assert told["error"] == "could not be asked: Resource temporarily unavailable"
    assert open_descriptors() == before
    assert scraper.ask(["metrics"])[0]["error"] is None


def test_a_mount_that_lets_nobody_in_is_told_apart_from_one_that_fails(tmp_path: Path) -> None:
    mount, other = stand_in(tmp_path, "other", number=1), stand_in(tmp_path, "gone", number=2)
    (other.mountpoint / ".trims/metrics").unlink()
    mount.mountpoint.chmod(0)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresuid(12345, 12345, 12345)
        os.write(writing, json.dumps(Scraper(5, lambda: [mount, other]).ask(["metrics"])).encode())
        os._exit(0)
    os.close(writing)
    tmp_path.chmod(0o755)
    with os.fdopen(reading) as pipe:
        gone, hidden = json.load(pipe)
    os.waitpid(pid, 0)

    assert (hidden["error"], hidden["hidden"]) == ("Permission denied", True)
    assert gone["hidden"] is (gone["error"] == "Permission denied")


def test_what_a_mount_tells_without_end_is_not_listened_to(tmp_path: Path) -> None:
    long, endless = stand_in(tmp_path, "long", "x" * (LONGEST["metrics"] + 1)), stand_in(tmp_path, "endless", number=2)
    (endless.mountpoint / ".trims/models").unlink()
    (endless.mountpoint / ".trims/models").symlink_to("/dev/zero")
    found = {one["store"]: one for one in Scraper(30, lambda: [long, endless]).ask(["metrics", "models"])}

    assert (found["long"]["error"], found["endless"]["error"]) == ("what it tells is too long", None)
    assert "models" not in found["endless"]["answers"]


def test_a_mount_with_very_many_files_takes_no_longer_for_each(tmp_path: Path) -> None:
    mount = stand_in(tmp_path, "a")
    (mount.mountpoint / ".trims/models").write_text('\\"' * (LONGEST["models"] // 2))
    began = time.process_time()
    [told] = Scraper(60, lambda: [mount]).ask(["metrics", "models"])

    assert len(told["answers"]["models"]) == LONGEST["models"]
    assert time.process_time() - began < 2


def test_what_a_hostile_server_tells_stays_its_own(tmp_path: Path) -> None:
    lies = 'trimsfs_up{mountpoint="/other"} 1\nup 1\ntrimsfs_files_open_handles{mountpoint="/other"} 7 NaN\n'
    text = merged({"/lies": parsed(lies), f"/{HOSTILE}": parsed(TEXT)}).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    assert {sample.labels["mountpoint"] for sample in samples} == {"/lies", f"/{HOSTILE[:-6]}\\n\\x1b[31m"}
    assert "/other" not in text
    for nonsense in ("trimsfs_x{", "trimsfs_x notanumber\n", 'trimsfs_x{a="b} 1\n', "# TYPE x nosuchtype\nx 1\n"):
        with pytest.raises(ValueError, match="its metrics cannot be read"):
            parsed(nonsense)


def test_an_hour_of_samples_is_kept_and_no_more() -> None:
    history, families = History(), parsed(TEXT)
    for number in range(2 * SAMPLES):
        history.add(
            number * INTERVAL_S, {"/models": families, "/silent": None} if number < SAMPLES else {"/models": None}
        )
    assert len(history.of("/models")) == SAMPLES
    assert history.of("/models")[-1] == [(2 * SAMPLES - 1) * INTERVAL_S]
    assert history.of("/silent") == []

    for number in range(2 * MOST_MOUNTS):
        history.add(1e6 + number, {f"/{number}": families})
    assert sum(bool(history.of(f"/{number}")) for number in range(2 * MOST_MOUNTS)) == MOST_MOUNTS
    assert history.of(f"/{2 * MOST_MOUNTS - 1}")[0][1:4] == [1024, 0, 0]


@pytest.mark.parametrize(("before", "after"), [(86_400.25, 1.8e9), (1.8e9, 86_400.25), (1.8e9, 1.8e9 - 1200)])
def test_samples_of_another_clock_are_forgotten(before: float, after: float) -> None:
    """As of a host whose clock starts in 1970 until it is set: a plot would span the years between."""
    history, families = History(), parsed(TEXT)
    history.add(before, {"/gone": families})
    for now in (before, before + INTERVAL_S, after, after + INTERVAL_S):
        history.add(now, {"/models": families})
    assert history.of("/gone") == []
    assert [sample[0] for sample in history.of("/models")] == [round(after, 1), round(after + INTERVAL_S, 1)]


def test_models_are_shown_by_use_with_who_has_them_open() -> None:
    files = [model(f"model-{number}/weights", uses=number) for number in range(2 * MOST_MODELS)]
    files += [model("open/a", uses=0, handles=1), model("open/b", uses=0)]
    user = {"pid": 7, "program": "python", "container": None, "paths": ["/in/container/open/b", "/x/.trims/metrics"]}
    result: dict[str, Any] = {"mountpoint": "/m", "store": "s", "error": None, "hidden": False} | {
        "answers": {"models": json.dumps({"models": files}), "users": [user]}
    }
    [told] = json.loads(status([(result, parsed(TEXT))], History(), whole=True))["mounts"]

    assert [one["model"] for one in told["models"][:2]] == ["open", f"model-{2 * MOST_MODELS - 1}"]
    assert (len(told["models"]), told["more_models"]) == (MOST_MODELS, MOST_MODELS + 1)
    assert told["models"][0]["users"] == [{"pid": 7, "program": "python", "container": None}]
    assert told["models"][0] | {"files": 2, "size": 20, "disk": 20, "memory": 10} == told["models"][0]
    result["answers"] = {"control": json.dumps({"waits": [{"thread": os.getpid(), "path": HOSTILE, "seconds": 2}]})}
    [told] = json.loads(status([(result, parsed(TEXT))], History(), whole=True))["mounts"]
    assert [(wait["path"], wait["seconds"]) for wait in told["waits"]] == [(HOSTILE, 2)]
    result["answers"] = {"models": '{"models": [{"path": 1}]}', "control": "nonsense"}
    assert json.loads(status([(result, parsed(TEXT))], History(), whole=True))["mounts"][0]["models"] == []


@pytest.mark.parametrize(
    ("answers", "metrics"),
    [
        ({"control": '{"started": NaN}'}, TEXT),
        ({"control": '{"waits": [{"thread": 1, "path": "x", "seconds": 1e999}]}'}, TEXT),
        ({"models": "[" * 100_000}, TEXT),
        ({}, "trimsfs_disk_used_bytes Inf\n"),
    ],
)
def test_what_json_cannot_show_hides_no_other_mount(answers: dict[str, str], metrics: str) -> None:
    lies: dict[str, Any] = {"mountpoint": "/lies", "store": "s", "error": None, "hidden": False, "answers": answers}
    scraped = [(lies, parsed(metrics)), (lies | {"mountpoint": "/m", "answers": {}}, parsed(TEXT))]
    text = status(scraped, History(), whole=True).decode()
    lying, sound = json.loads(text, parse_constant=pytest.fail)["mounts"]

    assert (lying["error"], lying["version"], lying["numbers"]) == ("what it tells cannot be shown", None, {})
    assert (sound["error"], sound["numbers"]["fetched"]) == (None, 1024)


def test_requests(tmp_path: Path, served: Callable[..., WebServer]) -> None:
    server = served([stand_in(tmp_path, "a")])
    server.mounts.sample()

    response, text = ask(server, "/metrics")
    assert (response.status, response.headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    assert f'trimsfs_up{{mountpoint="{tmp_path}/a"}} 1.0\n' in text
    response, text = ask(server, "/api/status?x=1")
    [mount] = json.loads(text)["mounts"]
    assert (mount["problems"], mount["numbers"]["fetched"]) == (["no answer"], 1024)
    assert mount["models"][0]["model"] == HOSTILE
    assert len(mount["history"]) == 1
    assert ask(server, "/", "HEAD")[1] == ""
    assert ask(server, "/../../etc/passwd")[0].status == 404
    assert ask(server, "/metrics", "POST")[0].status == 501


def test_the_status_page_loads_nothing_from_elsewhere_and_makes_no_html_of_names(
    tmp_path: Path, served: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served([stand_in(tmp_path, "a")])
    monkeypatch.setattr("trimsfs.extras.exporter.web._PAGE", tmp_path)  # an upgrade changes no page of one that runs

    for path, kind in (("/", "text/html"), ("/status.css", "text/css"), ("/status.js", "text/javascript")):
        response, text = ask(server, path)
        assert (response.status, response.headers["Content-Type"].split(";")[0]) == (200, kind)
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_a_name_that_another_site_leads_here_is_refused(tmp_path: Path, served: Callable[..., WebServer]) -> None:
    server = served([stand_in(tmp_path, "a")])
    hosts = {"127.0.0.1:9099": 200, "[::1]:9099": 200, "localhost": 200, "evil.example:9099": 421, "localhost.x": 421}
    for path in ("/", "/metrics", "/api/status"):
        assert {host: ask(server, path, Host=host)[0].status for host in hosts} == hosts


def test_a_token_is_asked_of_everybody(tmp_path: Path, served: Callable[..., WebServer]) -> None:
    server = served([stand_in(tmp_path, "a")], TOKEN)
    password = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()

    for wrong in ("", "Bearer", f"Bearer {TOKEN}x", f"Token {TOKEN}", "Basic %%%", "Bearer \xe9", "Basic /////w=="):
        for path in ("/", "/metrics", "/api/status", "/absent"):
            response, text = ask(server, path, Authorization=wrong)
            assert (response.status, "trimsfs_up" in text) == (401, False), (wrong, path)
    assert "Basic" in str(response.headers.get_all("WWW-Authenticate"))
    for right in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {password}"):
        assert ask(server, "/metrics", Authorization=right, Host="trimsfs.example")[0].status == 200


def test_a_unix_socket_and_one_that_is_left_over(tmp_path: Path, served: Callable[..., WebServer]) -> None:
    address = ListenAddress(path=tmp_path / "metrics.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(address.path))
    server = served([stand_in(tmp_path, "a")], address=address)

    assert ask(server, "/metrics")[0].status == 200
    with pytest.raises(ConfigurationError, match="another program listens there: end it, or choose another address"):
        listen(address)
    stayed = server.asked_to_stay
    assert listen(address, shared=True) is None
    assert server.asked_to_stay > stayed
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigurationError, match="this file is no socket: choose another address"):
        listen(ListenAddress(path=tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="No such file or directory: create its directory"):
        listen(ListenAddress(path=tmp_path / "absent/b/c"))


@pytest.mark.timeout(30)
def test_an_exporter_that_hangs_at_a_unix_socket_holds_up_no_mount_and_keeps_its_place(tmp_path: Path) -> None:
    address = ListenAddress(path=tmp_path / "metrics.sock")
    with contextlib.ExitStack() as stack:
        hanging = stack.enter_context(socket.socket(socket.AF_UNIX))
        hanging.bind(str(address.path))
        hanging.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(address.path))
        for shared in (False, True):
            with pytest.raises(ConfigurationError, match="another program listens there"):
                listen(address, shared=shared)
        assert (tmp_path / "metrics.sock").is_socket()


def test_clients_that_say_nothing_do_not_take_more_than_their_places(
    tmp_path: Path, served: Callable[..., WebServer]
) -> None:
    server = served([stand_in(tmp_path, "a")])
    silent = [socket.create_connection(server.socket.getsockname()) for _ in range(2 * MOST_REQUESTS)]
    try:
        assert [one for one in silent[MOST_REQUESTS:] if not _ended(one)] == []
    finally:
        for one in silent:
            one.close()
    wait_until(lambda: ask(server, "/")[0].status == 200, tolerate=ConnectionError)


def test_clients_that_send_their_request_byte_by_byte_give_their_places_back(
    tmp_path: Path, served: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.extras.exporter.web.REQUEST_TIMEOUT_S", 0.5)
    server = served([stand_in(tmp_path, "a")])
    slow = [socket.create_connection(server.socket.getsockname()) for _ in range(MOST_REQUESTS)]
    try:
        wait_until(lambda: _answers(server, slow), timeout_s=20, tolerate=ConnectionError)
    finally:
        for one in slow:
            one.close()


def _answers(server: WebServer, slow: list[socket.socket]) -> bool:
    """Whether the page comes, while each of these clients sends another byte."""
    for one in slow:
        with contextlib.suppress(ConnectionError):
            one.send(b"G")
    return ask(server, "/")[0].status == 200


def test_a_host_without_threads_takes_no_places(
    tmp_path: Path, served: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = served([stand_in(tmp_path, "a")])

    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as short:
        short.setattr(threading.Thread, "start", start)
        for _ in range(MOST_REQUESTS):
            with pytest.raises(ConnectionError):
                ask(server, "/")
    assert ask(server, "/")[0].status == 200


def _ended(connection: socket.socket) -> bool:
    connection.settimeout(5)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0o600, "No such file or directory"),
        (b"short\n", 0o600, "needs 16 ASCII characters: `openssl rand"),
        (b"\xff" * 20, 0o600, "is not text"),
        (b"x" * 20, 0o644, "all users can read it: `chmod o-r"),
    ],
)
def test_a_token_is_the_first_line_of_a_file_that_others_cannot_read(
    tmp_path: Path, content: bytes | None, mode: int, message: str
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\ncomment\n")
    file.chmod(0o640)
    assert read_token(file) == TOKEN
    file.unlink()
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"option --token-file {file}: {message}"):
        read_token(file)
