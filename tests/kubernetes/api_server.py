"""A stand-in for Kubernetes' API server: it has one node, which a service account may get and patch over TLS."""

import copy
import json
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.http_server import Server

TOKEN = "token-of-the-pod"


@dataclass
class ApiServer:
    """*refuses* is the status of all answers, unless 0. ``account`` is the directory that a pod has of its account."""

    account: Path
    node: dict[str, Any]
    refuses: int = 0
    port: int = 0
    patches: list[dict[str, Any]] = field(default_factory=list)

    @property
    def labels(self) -> dict[str, str]:
        """The node's labels."""
        found: dict[str, str] = self.node["metadata"]["labels"]
        return found

    @property
    def environment(self) -> dict[str, str]:
        """What Kubernetes sets in each pod."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    def answer(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        status, body = self._answer(request)
        return status, {}, json.dumps(body).encode()

    def _answer(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, Any]]:
        if self.refuses:
            return self.refuses, {}
        if request.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {}
        if request.path != f"/api/v1/nodes/{self.node['metadata']['name']}":
            return 404, {}
        if request.command == "PATCH":
            if request.headers["Content-Type"] != "application/merge-patch+json":
                return 415, {}
            change = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
            self.node = merged(self.node, change)
            self.patches.append(change)  # last: who waits for it looks at the node then
        return 200, self.node


def merged(document: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A document after a JSON merge patch, as RFC 7386 has it."""
    result = copy.deepcopy(document)
    for name, value in change.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            result[name] = merged(result.get(name, {}), value)
        else:
            result[name] = value
    return result


@contextmanager
def api_server(directory: Path, name: str, labels: dict[str, str]) -> Iterator[ApiServer]:
    """An API server with a node of this name."""
    account = directory / "serviceaccount"
    account.mkdir()
    subject = ["-subj", "/CN=kubernetes", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(directory / "key.pem"), "-out", str(account / "ca.crt")]
    subprocess.run(["openssl", "req", *kind, *subject, *files], check=True, capture_output=True, timeout=60)
    (account / "token").write_text(TOKEN)
    node = {"kind": "Node", "metadata": {"name": name, "labels": labels}, "spec": {}}
    served = ApiServer(account, node)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(account / "ca.crt", directory / "key.pem")
    with Server(served.answer, context).running() as server:
        served.port = urlsplit(server.url).port or 0
        yield served
