"""The broker: reads a directory store for the server of root's mount, whose own user may not.

The server forks this process while it is still root. The broker has no network, keeps only the capability to read any
file, and reads nothing outside of the store. The server gets names, sizes and times from it, and read-only descriptors
of regular files. It never gets one of a directory, which would lead to files outside of the store.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from trimsfs import errors
from trimsfs.concurrency.channel import MESSAGE_LIMIT
from trimsfs.concurrency.helper_process import fork_helper
from trimsfs.errors import StoreError, TransientStoreError
from trimsfs.stores.base import Page
from trimsfs.stores.local_directory import MOST_NAMES, DirectoryReader
from trimsfs.types import Generation

THREADS = 16
"""Requests that are answered at once."""
ANSWER_TIMEOUT_S = 30.0
"""How long a request waits for each part of its answer: the directory may be on a disk that does not answer."""
_PIECE = 1 << 16
_NAMES = tuple(each.name for each in fields(Generation))
_VALUES = attrgetter(*_NAMES)


class Broker:
    """The server's end, a `DirectoryReader` for any thread and for processes forked later.

    The broker process ends once all processes have closed this end. It calls *confine* to drop privileges, and closes
    the descriptors *not_for_it*.
    """

    def __init__(
        self, reader: DirectoryReader, *, confine: Callable[[], None], mountpoint: Path, not_for_it: Iterable[int]
    ) -> None:

        def work(orders: socket.socket) -> None:
            confine()
            _serve(orders, reader)

        self.process = fork_helper("broker", work, mountpoint=mountpoint, not_for_it=not_for_it)
        self._socket = self.process.socket
        self._socket.settimeout(ANSWER_TIMEOUT_S)

    def fileno(self) -> int:
        """The descriptor of this end."""
        return self._socket.fileno()

    def probe(self) -> None:
        self._ask(do="probe")

    def list_page(self, prefix: str, token: str | None, limit: int) -> Page:
        page, _ = self._ask(do="list", key=prefix, token=token, limit=limit)
        objects, prefixes, next_token, empty, unreadable = page
        return Page(
            objects=tuple(map(_generation, objects)),
            prefixes=tuple(prefixes),
            next_token=next_token,
            empty=empty,
            unreadable=tuple(unreadable),
        )

    def stat(self, key: str) -> Generation:
        return _generation(self._ask(do="stat", key=key)[0])

    def open(self, key: str) -> int:
        _, descriptor = self._ask(do="open", key=key)
        if descriptor is None:
            raise _lost()
        return descriptor

    def _ask(self, **request: object) -> tuple[Any, int | None]:
        """The broker's answer to a request, and the descriptor that came with it, if any."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                try:
                    socket.send_fds(self._socket, [json.dumps(request).encode()], [theirs.fileno()])
                except OSError as error:
                    raise _lost() from error
            ours.settimeout(ANSWER_TIMEOUT_S)
            descriptors: list[int] = []
            try:
                data, descriptors, _, _ = socket.recv_fds(ours, _PIECE, 1, socket.MSG_CMSG_CLOEXEC)
                pieces = [data]
                while pieces[-1]:
                    pieces.append(ours.recv(_PIECE))
                answer = json.loads(b"".join(pieces))
            except (TimeoutError, ValueError) as error:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise _lost() from error
        return _result(answer), descriptors[0] if descriptors else None


def _result(answer: dict[str, Any]) -> Any:
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["text"])
    return answer["result"]


def _generation(values: list[Any]) -> Generation:
    return Generation(**dict(zip(_NAMES, values, strict=True)))


def _lost() -> TransientStoreError:
    return TransientStoreError("the broker did not answer")


# In the broker process


def _serve(orders: socket.socket, reader: DirectoryReader) -> None:
    """Answer until nobody is left who could ask."""
    with ThreadPoolExecutor(THREADS) as threads:  # it starts them as they are needed
        free = threading.Semaphore(THREADS)
        while True:
            free.acquire()
            data, descriptors, _, _ = socket.recv_fds(orders, MESSAGE_LIMIT, 1, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return
            if descriptors:
                threads.submit(_answer_and_close, descriptors[0], data, reader, free)
            else:
                free.release()


def _answer_and_close(descriptor: int, data: bytes, reader: DirectoryReader, free: threading.Semaphore) -> None:
    try:
        with socket.socket(fileno=descriptor) as end:
            _answer(end, data, reader)
    finally:
        free.release()


def _answer(end: socket.socket, data: bytes, reader: DirectoryReader) -> None:
    """Answer a request; a malformed one, which no intact server sends, gets no answer."""
    file: int | None = None
    try:
        result, file = _do(json.loads(data), reader)
        answer: dict[str, Any] = {"result": result}
    except OSError as error:
        answer = {"errno": error.errno, "file": error.filename if isinstance(error.filename, str) else None}
    except StoreError as error:
        answer = {"error": type(error).__name__, "text": str(error)}
    except (ValueError, RecursionError, TypeError):
        return
    try:
        with contextlib.suppress(OSError):  # the requester has gone
            text = json.dumps(answer).encode()
            sent = socket.send_fds(end, [text], [] if file is None else [file])
            end.sendall(text[sent:])
    finally:
        if file is not None:
            os.close(file)


def _do(request: object, reader: DirectoryReader) -> tuple[object, int | None]:
    """The result of a request, and a descriptor for an open. Raises ValueError for a malformed request."""
    match request:
        case {"do": "probe"}:
            reader.probe()
            return None, None
        case {"do": "list", "key": str(key), "token": str() | None as token, "limit": int(limit)} if limit > 0:
            page = reader.list_page(key, token, min(limit, MOST_NAMES))
            objects = [_VALUES(generation) for generation in page.objects]
            return (objects, page.prefixes, page.next_token, page.empty, page.unreadable), None
        case {"do": "stat", "key": str(key)}:
            return _VALUES(reader.stat(key)), None
        case {"do": "open", "key": str(key)}:
            return None, reader.open(key)
    raise ValueError("not a request")
