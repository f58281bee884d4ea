"""Serves the CSI driver on a Unix socket until SIGTERM."""

import contextlib
import logging
import os
import re
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor, message_factory
from google.protobuf.message import DecodeError, Message

from mountctl.extras.csi import DRIVER_NAME, csi_pb2
from mountctl.extras.csi.csi_requests import subject
from mountctl.extras.csi.identity_service import IdentityService
from mountctl.extras.csi.mount_commands import MountCommands
from mountctl.extras.csi.mounts_directory import MountsDirectory
from mountctl.extras.csi.node_service import NodeService
from mountctl.extras.csi.service_account_tokens import ServiceAccountTokens
from mountctl.extras.csi.status_errors import StatusError

log = logging.getLogger(__name__)

THREADS = 16
CALLS_LIMIT = 64
"""The most calls that run or wait for a thread; gRPC refuses others with RESOURCE_EXHAUSTED."""
MESSAGE_LIMIT = 1 << 20
SOCKET_PATH_LIMIT = 107
STOP_TIMEOUT_S = 10.0


class EndpointError(Exception):
    """The driver cannot serve the socket."""


class EndpointNameError(EndpointError):
    """The endpoint names no socket."""


def serve(
    *, endpoint: str, node_id: str, mounts_dir: Path, tenants: Path | None, tokens: ServiceAccountTokens | None
) -> None:
    """Serve until SIGTERM or SIGINT; volumes stay mounted. Raises EndpointError with one line."""
    path = _socket_path(endpoint)
    mounts, children = MountsDirectory(mounts_dir), MountCommands()
    identity = IdentityService(mounts=mounts, children=children)
    node = NodeService(node_id=node_id, mounts=mounts, children=children, tenants=tenants, tokens=tokens)
    services = csi_pb2.DESCRIPTOR.services_by_name
    server = grpc.server(
        ThreadPoolExecutor(max_workers=THREADS),
        handlers=[_handlers(services["Identity"], identity), _handlers(services["Node"], node)],
        options=[("grpc.max_receive_message_length", MESSAGE_LIMIT), ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=CALLS_LIMIT,
    )
    with _ending() as wait:
        with _only_for_root():
            listen(server, path)
        server.start()
        log.info("%s serves %s for %s", DRIVER_NAME, mounts_dir, path)
        wait()
        server.stop(STOP_TIMEOUT_S).wait()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _ending() -> Iterator[Callable[[], object]]:
    """Yields a function that returns once the process gets SIGTERM or SIGINT.

    It waits on a socket: if a thread of gRPC gets the signal, a lock would not wake the main thread.
    """
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        try:
            yield partial(receiver.recv, 1)
        finally:
            signal.set_wakeup_fd(-1)


def _socket_path(endpoint: str) -> Path:
    text = endpoint.removeprefix("unix://") if endpoint.startswith("unix://") else endpoint.removeprefix("unix:")
    if not text.startswith("/") or text.endswith("/") or not endpoint.startswith("unix:"):
        raise EndpointNameError(f"--endpoint {endpoint}: must be unix:///DIRECTORY/NAME")
    if len(os.fsencode(text)) > SOCKET_PATH_LIMIT:
        raise EndpointNameError(
            f"--endpoint {endpoint}: is longer than {SOCKET_PATH_LIMIT} bytes: choose a shorter path"
        )
    return Path(text)


def listen(server: grpc.Server, path: Path) -> None:
    """Listen at *path*; replaces the stale socket of an earlier driver, but neither a file nor a socket in use."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise EndpointError(f"--endpoint {path}: exists and is not a socket: choose another path")
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(1)
            other.connect(str(path))
        raise EndpointError(f"--endpoint {path}: another driver listens there: end it first")
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        path.unlink()
    except OSError as error:
        raise EndpointError(f"--endpoint {path}: {error.strerror or error}") from None
    if not path.parent.is_dir():
        raise EndpointError(f"--endpoint {path}: {path.parent} does not exist: create it")
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        why = f"cannot listen there: {error}" if os.geteuid() == 0 else "only root can listen there: run it as root"
        raise EndpointError(f"--endpoint {path}: {why}") from None


@contextlib.contextmanager
def _only_for_root() -> Iterator[None]:
    """Create files in this block for this user only."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _handlers(service: descriptor.ServiceDescriptor, implementation: object) -> grpc.GenericRpcHandler:
    """Map each call of a service to the method of that name: NodeGetInfo to ``node_get_info``."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            _as_grpc(method, getattr(implementation, name)),
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _as_grpc(
    method: descriptor.MethodDescriptor, call: Callable[[Any], Message]
) -> Callable[[bytes, grpc.ServicerContext], Message]:
    """A gRPC handler: returns a StatusError's status; logs an unexpected error, which ends only this call."""
    name = method.name
    kind = message_factory.GetMessageClass(method.input_type)

    def handle(request: bytes, context: grpc.ServicerContext) -> Message:  # noqa: RET503 - abort raises
        about = name
        try:
            parsed = kind.FromString(request)
            about = f"{name}{subject(parsed)}"
            return call(parsed)
        except DecodeError:
            code, message = grpc.StatusCode.INVALID_ARGUMENT, f"{name}: the request is not a {method.input_type.name}"
            log.warning("%s", message)
        except StatusError as error:
            code, message = error.code, str(error)
            log.warning("%s: %s: %s", about, code.name, message)
        except Exception:
            log.exception("%s", about)
            code, message = grpc.StatusCode.INTERNAL, f"{name}: unexpected error: see the driver's log"
        context.abort(code, message)

    return handle
