"""A store that lies: readers get the right bytes or an error, and the server goes on."""

import concurrent.futures
import errno
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.backends import s3_options, use_only
from tests.security.hostile import BUCKET, Answer, Told, hostile_store
from tests.security.names import check_log
from tests.support.mounts import MountedStore, mounted, wait_until
from tests.support.processes import family
from tests.support.survival import Survived
from trimsfs.errors import TransientStoreError
from trimsfs.stores.open import open_store
from trimsfs.types import SIZE_MAX

CONTENT = b"weights of a model" * 100
MEMORY_LIMIT_KIB = 400 << 10
"""What no process of a mount takes, whatever it is sent."""
OPTIONS = ("--retry-deadline", "0.2", "stall_timeout=0.5", "--metadata-ttl", "0", "--prefetch", "off")

LIES: dict[str, Told] = {
    "size negative": Told(content=CONTENT, size="-5"),
    "size beyond 63 bits": Told(content=CONTENT, size=str(1 << 63)),
    "size beyond all": Told(content=CONTENT, size="9" * 100),
    "size of an exabyte": Told(content=CONTENT, size=str(1 << 60)),
    "size above the largest": Told(content=CONTENT, size=str(SIZE_MAX + 1)),
    "size too large": Told(content=CONTENT, size=str(len(CONTENT) + 1)),
    "size too small": Told(content=CONTENT, size=str(len(CONTENT) - 1)),
    "size none": Told(content=CONTENT, size="0"),
    "size no number": Told(content=CONTENT, size="many"),
    "size empty": Told(content=CONTENT, size=""),
    "size a float": Told(content=CONTENT, size="1e3"),
    "size with underscores": Told(content=CONTENT, size="1_800"),
    "etag with a header": Told(content=CONTENT, etag='"a\r\nX-Evil: 1\r\n\r\nGET / HTTP/1.1"'),
    "etag with a newline": Told(content=CONTENT, etag='"a\nb"'),
    "etag of quotes": Told(content=CONTENT, etag='a"b"\'<>&'),
    "etag of a megabyte": Told(content=CONTENT, etag='"' + "e" * 1_000_000 + '"'),
    "etag empty": Told(content=CONTENT, etag=""),
    "etag none": Told(content=CONTENT, etag=None),
    "etag of other characters": Told(content=CONTENT, etag='"é☃"'),
    "etag for all": Told(content=CONTENT, etag="*"),
    "time of yesterday": Told(content=CONTENT, modified="yesterday"),
    "time of 9999": Told(content=CONTENT, modified="9999-12-31T23:59:59.999Z"),
    "time of 0001": Told(content=CONTENT, modified="0001-01-01T00:00:00.000Z"),
    "time of 2300": Told(content=CONTENT, modified="2300-01-01T00:00:00Z"),
    "time beyond numbers": Told(content=CONTENT, modified="1e400"),
    "time beyond calendars": Told(content=CONTENT, modified="9" * 20),
    "time empty": Told(content=CONTENT, modified=""),
    "range of another part": Told(content=CONTENT, content_range=f"bytes 5-{len(CONTENT) + 4}/{len(CONTENT) + 5}"),
    "range without a size": Told(content=CONTENT, content_range=f"bytes 0-{len(CONTENT) - 1}/*"),
    "range of another size": Told(content=CONTENT, content_range=f"bytes 0-{len(CONTENT) - 1}/{1 << 50}"),
    "said to be compressed": Told(content=CONTENT, headers={"Content-Encoding": "gzip"}),
    "version of many bytes": Told(content=CONTENT, headers={"x-amz-version-id": "v" * 30_000}),
    "version of odd bytes": Told(content=CONTENT, headers={"x-amz-version-id": "v\x01\x7f"}),
    "metadata of many bytes": Told(content=CONTENT, headers={f"x-amz-meta-{n}": "m" * 9000 for n in range(60)}),
}
NO_LISTING = {
    *("size no number", "size empty", "size a float", "etag none"),
    *("time of yesterday", "time beyond numbers", "time beyond calendars"),
}
"""Those that make a listing none of S3's, as a whole."""
LISTED = {errno.EIO, errno.ENOENT, errno.ESTALE}
"""What readers of an object may get that the store lies of: of one that cannot be, that it is not there."""


def heaviest_kib(mount: MountedStore) -> int:
    """The memory of the largest process of a mount."""
    sizes = [0]
    for pid in family(mount.control()["keeper_pid"]):
        try:
            sizes.append(int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]))
        except (OSError, IndexError):
            continue
    return max(sizes)


def look(mount: MountedStore, name: str) -> tuple[Counter[str], int]:
    """What comes of the calls for an object of which the store lies, and how often bytes were wrong."""
    errors: Counter[str] = Counter()
    told, directory = LIES[name], mount.path / name
    right = told.content[: int(told.length)] if name in {"size too small", "size none"} else told.content
    wrong = 0
    for call in (os.listdir, lambda path: os.stat(path / "lie"), lambda path: (path / "lie").read_bytes()):
        try:
            found = call(directory)
        except OSError as error:
            errors[errno.errorcode[error.errno or 0]] += 1
        else:
            errors["0"] += 1
            wrong += isinstance(found, bytes) and found != right
    truth = directory / "truth"
    if name in NO_LISTING:
        with pytest.raises(OSError, match="Input/output error"):
            truth.read_bytes()
    else:
        # With this deadline, what is told of other objects may open the circuit breaker for a moment.
        wait_until(lambda: truth.read_bytes() == name.encode(), tolerate=OSError)
    return errors, wrong


def test_lies_of_a_store_are_errors_or_have_no_effect(tmp_path: Path, survived: Survived) -> None:
    """Of each object the store lies, in a directory with one of which it does not."""
    objects = {f"{name}/lie".encode(): told for name, told in LIES.items()}
    objects |= {f"{name}/truth".encode(): Told(content=name.encode()) for name in LIES}
    with (
        hostile_store(objects) as store,
        mounted(store.url, tmp_path, *OPTIONS, environment=store.server.environment()) as mount,
    ):
        with concurrent.futures.ThreadPoolExecutor(8) as readers:
            seen = list(readers.map(lambda name: look(mount, name), LIES))
        log = mount.log()
        assert mount.metrics()["trimsfs_server_restarts_total"] == 0
        assert heaviest_kib(mount) < MEMORY_LIMIT_KIB
    check_log(log)
    assert set(re.findall(r"^\S+ \S+ \w+ (\S+): .*\n  Traceback", log, re.MULTILINE)) <= {"urllib3.connection"}
    for defect in ("the fetch process died", "internal error", "credentials"):
        assert defect not in log
    assert not any("x-evil" in headers or "X-Evil" in path for path, headers in store.http.requests)
    errors = sum((counted for counted, _ in seen), Counter[str]())
    operations = errors.total()
    del errors["0"]
    survived(
        "lies of a store",
        injected=len(LIES),
        operations=operations,
        errors=errors,
        allowed=[errno.errorcode[number] for number in LISTED],
        wrong=sum(wrong for _, wrong in seen),
    )


def forever(head: bytes, piece: bytes, *, pause_s: float = 0.0) -> Iterator[bytes]:
    """An answer that goes on for as long as anybody listens, within the patience of tests."""
    if head:
        yield head
    until = time.monotonic() + 120
    while time.monotonic() < until:
        yield piece
        time.sleep(pause_s)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nConnection: close\r\n\r\n"
FAILED = OK.replace(b"200 OK", b"500 Failed")
PART = (
    b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-99/100\r\n"
    b'ETag: "0123456789abcdef"\r\nLast-Modified: Mon, 06 May 2024 07:08:09 GMT\r\n\r\n'
)
BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "lol">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + depth, b"&%c;" % (97 + depth) * 10) for depth in range(9))
    + b"]><ListBucketResult><Name>&j;</Name></ListBucketResult>"
)
OUTSIDE = (
    b'<?xml version="1.0"?><!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/hostname">]><ListBucketResult>'
    b"<IsTruncated>false</IsTruncated><Contents><Key>d/&x;</Key><Size>1</Size><ETag>&x;</ETag>"
    b"<LastModified>2020-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>"
)
LISTINGS: dict[str, Callable[[], Answer | Iterator[bytes]]] = {
    "listing without an end": lambda: forever(OK, b"<a>" * 50_000),
    "listing of entities": lambda: (200, {}, BOMB),
    "listing with a file": lambda: (200, {}, OUTSIDE),
    "listing of a million levels": lambda: (200, {}, b"<a>" * 1_000_000 + b"</a>" * 1_000_000),
    "listing of something else": lambda: (200, {}, os.urandom(1 << 20)),
    "listing that drips": lambda: forever(OK, b"<", pause_s=0.1),
}
BODIES: dict[str, Callable[[], Answer | Iterator[bytes]]] = {
    "error without an end": lambda: forever(FAILED, b"<a>" * 50_000),
    "error of entities": lambda: (403, {}, BOMB.replace(b"ListBucketResult", b"Error")),
    "head without an end": lambda: forever(b"HTTP/1.1 206 Partial Content\r\n", b"X-A: b\r\n" * 10),
    "head of one line without an end": lambda: forever(b"HTTP/1.1 206 Partial Content\r\nX-A: ", b"b" * 1000),
    "head that drips": lambda: forever(b"HTTP/1.1 206 Partial Content\r\nX-A: ", b"b", pause_s=0.1),
    "head that is to come": lambda: forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.001),
    "body that drips": lambda: forever(PART, b"1\r\nx\r\n", pause_s=0.1),
    "chunk of no size": lambda: forever(PART + b"1;", b"a" * 1000),
    "no HTTP": lambda: iter([os.urandom(1000)]),
    "elsewhere": lambda: (302, {"Location": "file:///etc/passwd"}, b""),
    "status of no kind": lambda: (999, {}, b""),
}


def test_answers_without_an_end_cost_neither_memory_nor_time(tmp_path: Path, survived: Survived) -> None:
    """Each is given to a reader of its own, all at once."""
    objects = {f"{name}/model".encode(): Told(content=b"x" * 100) for name in (*LISTINGS, *BODIES)}
    objects[b"truth"] = Told(content=CONTENT)
    with (
        hostile_store(objects) as store,
        mounted(store.url, tmp_path, *OPTIONS, environment=store.server.environment()) as mount,
    ):
        for name in BODIES:
            os.listdir(mount.path / name)
        store.answer = said
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(len(objects)) as readers:
            calls: list[concurrent.futures.Future[Any]] = [
                *(readers.submit(os.listdir, mount.path / name) for name in LISTINGS),
                *(readers.submit((mount.path / name / "model").read_bytes) for name in BODIES),
            ]
            wait_until(lambda: (mount.path / "truth").read_bytes() == CONTENT, tolerate=OSError)
            errors = Counter(outcome(call) for call in calls)
        took = time.monotonic() - began
        assert heaviest_kib(mount) < MEMORY_LIMIT_KIB
        assert mount.metrics()["trimsfs_server_restarts_total"] == 0
        assert "Traceback" not in mount.log()
        check_log(mount.log())
    assert took < 60  # before the answers end by themselves
    survived(
        "answers without an end",
        injected=len(calls),
        operations=len(calls),
        errors=errors,
        allowed=["EIO", "EACCES"],
        wrong=errors["0"],
    )


def said(method: str, key: bytes, query: dict[str, str]) -> Answer | Iterator[bytes] | None:
    """What is said of a directory, or to a read of an object."""
    prefix, _, name = key.decode().partition("/")
    if not key:
        told = LISTINGS.get(query.get("prefix", "").rstrip("/"))
    else:
        told = BODIES.get(prefix) if name == "model" and method == "GET" else None
    return None if told is None else told()


def outcome(call: "concurrent.futures.Future[Any]") -> str:
    try:
        call.result(60)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "0"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate that nobody knows, for this host; its key is with it in ``key``."""
    certificate, key = tmp_path / "certificate", tmp_path / "key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=store"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    key.write_bytes(key.read_bytes() + certificate.read_bytes())
    return certificate


async def test_a_store_that_cannot_prove_who_it_is_is_sent_nothing(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hostile_store({b"model": Told(content=CONTENT)}, certificate=certificate.with_name("key")) as store:
        use_only(store.server, monkeypatch)
        for trusted in (False, True):
            if trusted:
                monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
            opened = open_store(s3_options(store.server.endpoint_url, BUCKET), max_requests=2)
            if trusted:
                assert (await opened.stat("model")).size == len(CONTENT)
                assert len(store.http.requests) == 1
            else:
                with pytest.raises(TransientStoreError, match="is not trusted by the CA file"):
                    await opened.stat("model")
                assert store.http.requests == []
            await opened.aclose()
