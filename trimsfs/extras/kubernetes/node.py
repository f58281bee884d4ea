"""Labels of a Kubernetes node: valid names for models, the patch that replaces them, and the API server."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import urllib3

from trimsfs.errors import ConfigurationError, NoSuchEntryError, NotPermittedError, StoreUnavailableError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts the credentials of a pod."""
NAME_LIMIT, PREFIX_LIMIT = 63, 253
HASH_DIGITS = 10
STEP = 10
"""Labels tell percents in steps of this size, so that a fetch changes a node a few times and not all the time."""
TIMEOUT_S = 10.0

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


def check_prefix(prefix: str) -> str:
    """A prefix of label keys. Raises ConfigurationError unless it is a DNS name."""
    if len(prefix) > PREFIX_LIMIT or not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(f"--prefix {prefix[:80]}: must be a DNS name, such as warm.trimsfs.dev")
    return prefix


def label_key(prefix: str, model: str) -> str:
    """The key of a model's label: its path if that is a valid name, else a similar name with a hash of the path."""
    if len(model) <= NAME_LIMIT and _NAME.fullmatch(model):
        return f"{prefix}/{model}"
    digest = hashlib.sha256(model.encode(errors="surrogateescape")).hexdigest()[:HASH_DIGITS]
    readable = re.sub(r"[^A-Za-z0-9_.-]+", ".", model)[: NAME_LIMIT - HASH_DIGITS - 1].strip("_.-")
    return f"{prefix}/{readable}-{digest}" if readable else f"{prefix}/{digest}"


def labels(prefix: str, shares: Mapping[str, float]) -> dict[str, str]:
    """The labels of models by the *shares* of them that are on disk, 0 to 1: percents, rounded down."""
    percents = {model: min(int(share * 100), 100) // STEP * STEP for model, share in shares.items()}
    return {label_key(prefix, model): str(percent) for model, percent in percents.items() if percent > 0}


def patch(prefix: str, current: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, Any]:
    """The JSON merge patch of a node that gives it the *wanted* labels and removes others of the prefix; {} if none."""
    stale = {key: None for key in current if key.startswith(f"{prefix}/") and key not in wanted}
    changed = {key: value for key, value in wanted.items() if current.get(key) != value}
    return {"metadata": {"labels": {**stale, **changed}}} if stale or changed else {}


class Node:
    """A node of the cluster that this container runs in, with the rights of the pod's service account."""

    def __init__(
        self, name: str, *, environment: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT
    ) -> None:
        if not _PREFIX.fullmatch(name):
            raise ConfigurationError(f"--node {name[:80]}: is no name of a node")
        host, port = (environment.get(f"KUBERNETES_SERVICE_{what}") for what in ("HOST", "PORT"))
        if host is None or not (account / "token").exists():
            raise ConfigurationError(f"--node: needs a pod with a service account: {account}/token is missing")
        self._token = account / "token"
        self._name = name
        self._url = f"https://{f'[{host}]' if ':' in host else host}:{port}/api/v1/nodes/{name}"
        self._pool = urllib3.PoolManager(ca_certs=str(account / "ca.crt"), timeout=TIMEOUT_S, retries=1)

    def labels(self) -> dict[str, str]:
        """All labels of the node. Raises NotPermittedError, NoSuchEntryError, StoreUnavailableError."""
        labels: dict[str, str] = self._request("GET")["metadata"].get("labels", {})
        return labels

    def apply(self, change: Mapping[str, Any]) -> None:
        """Patch the node. Raises as `labels`."""
        self._request("PATCH", json.dumps(change).encode())

    def _request(self, method: str, body: bytes | None = None) -> dict[str, Any]:
        headers = {  # the kubelet renews the token: it is read each time
            "Authorization": f"Bearer {self._token.read_text().strip()}",
            "Content-Type": "application/merge-patch+json",
        }
        try:
            answer = self._pool.request(method, self._url, body=body, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            raise StoreUnavailableError(f"the API server at {self._url}: {error}") from None
        match answer.status:
            case 200:
                document: dict[str, Any] = answer.json()
                return document
            case 401 | 403:
                raise NotPermittedError(
                    f"node {self._name}: {method}: the API server refuses it: "
                    "the service account must have get and patch of nodes"
                )
            case 404:
                raise NoSuchEntryError(f"node {self._name}: does not exist: give --node spec.nodeName")
            case status:
                raise StoreUnavailableError(f"node {self._name}: {method}: the API server answers {status}")
