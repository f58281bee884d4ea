"""Debian's docker-registry, a real OCI registry, in a process of its own, and artifacts pushed to it by oras."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oras.provider

from . import HOST, SCRATCH, accepts, reserved_ports, run_daemon

log = logging.getLogger(__name__)

FILEPATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
MODEL = "application/vnd.cncf.model"
MODELKIT = "application/vnd.kitops.modelkit"
CONFIG = b"{}"
USER, PASSWORD = "reader", "secret"
_HTPASSWD = "reader:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"


@dataclass(frozen=True)
class Layer:
    """A layer to push: its bytes, media type and annotations."""

    content: bytes
    media_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry: its ``HOST:PORT`` and the directory that its blobs are in."""

    address: str
    directory: Path
    _pushed: set[tuple[str, str]] = field(default_factory=set)

    def client(self) -> Any:
        """oras' client of the registry."""
        client = oras.provider.Registry(self.address, insecure=True, auth_backend="token")
        client.session.trust_env = False
        return client

    def push(self, repository: str, layers: Sequence[Layer], *, annotations: Mapping[str, str] | None = None) -> str:
        """Push an artifact by oras, as REPOSITORY:TAG; the digest of its manifest."""
        client = self.client()
        container = client.get_container(f"{self.address}/{repository}")
        config = Layer(CONFIG, "application/vnd.oci.empty.v1+json")
        with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
            file = Path(scratch, "blob")
            for layer in (config, *layers):
                if (container.api_prefix, layer.digest) not in self._pushed:
                    file.write_bytes(layer.content)
                    client._check_200_response(client.upload_blob(str(file), container, _descriptor(layer)))
                    self._pushed.add((container.api_prefix, layer.digest))
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor(config),
            "layers": [_descriptor(layer) for layer in layers],
            "annotations": dict(annotations or {}),
        }
        answer = client.upload_manifest(manifest, container)
        client._check_200_response(answer)
        return str(answer.headers["Docker-Content-Digest"])


def _descriptor(layer: Layer) -> dict[str, Any]:
    return {
        "mediaType": layer.media_type,
        "digest": layer.digest,
        "size": len(layer.content),
        "annotations": dict(layer.annotations),
    }


def titled(name: str, content: bytes) -> Layer:
    """A file as `oras push` makes it a layer."""
    return Layer(content, "application/vnd.oci.image.layer.v1.tar", {TITLE: name})


def packed(files: Mapping[str, bytes | None], *, modified: int = 1_700_000_000, compress: bool = False) -> bytes:
    """A tar archive of files by their paths; None is a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.mtime = modified
            if content is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    return gzip.compress(buffer.getvalue()) if compress else buffer.getvalue()


def password_of(directory: Path) -> dict[str, Any]:
    """Settings of a registry that asks for USER's PASSWORD; its file is put into *directory*."""
    file = directory / "htpasswd"
    file.write_text(_HTPASSWD)
    return {"auth": {"htpasswd": {"realm": "test", "path": str(file)}}}


def log_in(directory: Path, server: str, *, password: str = PASSWORD) -> None:
    """Leave what `docker login` does in a directory, ``DOCKER_CONFIG``."""
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {server: {"auth": auth}}}))


def missing_program() -> str | None:
    """The program that is needed and not installed."""
    return None if shutil.which("docker-registry") else "docker-registry"


@contextlib.contextmanager
def start_registry(settings: Mapping[str, Any] | None = None, *, data: Path | None = None) -> Iterator[Registry]:
    """Run a registry until the context ends, with more *settings* of its configuration file: an empty one, or of the
    *data* directory of another.

    Raises ServiceError when it does not answer within 30 seconds.
    """
    with tempfile.TemporaryDirectory(prefix="trimsfs-registry-", dir=SCRATCH) as scratch, reserved_ports() as ports:
        directory = Path(scratch)
        data = data or directory / "data"
        config = {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": str(data)}, "delete": {"enabled": True}},
            **(settings or {}),
            "http": {"addr": f"{HOST}:{ports[0]}", "secret": "test", **(settings or {}).get("http", {})},
        }
        file = directory / "config.yml"
        file.write_text(json.dumps(config))  # which YAML can read
        arguments = ["docker-registry", "serve", str(file)]
        with run_daemon("docker-registry", arguments, directory / "registry.log", os.environ) as daemon:
            daemon.wait_until(lambda: accepts(ports[0]), 30)
            log.info("docker-registry answers at port %d", ports[0])
            yield Registry(f"{HOST}:{ports[0]}", data)
