"""Google's application default credentials: a key file, the user's login, workload identity, or the metadata server."""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import urllib3.exceptions

from trimsfs.errors import ConfigurationError, StoreAccessError, TransientStoreError
from trimsfs.extras.stores.cloud.connections import Request, Sign, http_client
from trimsfs.stores.http.failures import one_line, parsing

REMEDY = (
    "check the credentials: `gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS; "
    "to read a public bucket, --anonymous"
)
SCOPES = ("https://www.googleapis.com/auth/devstorage.read_only",)
LOOK_AGAIN_S = 30
"""Seconds after which missing credentials are looked for again: a metadata server may answer by then."""
_TOKENS = "https://oauth2.googleapis.com"


def default_credentials(subject: str, url: str, stall_timeout_s: float) -> Sign:
    """Signs requests with the credentials that google-auth finds: now, as root, or when the first request needs them.

    A request for a token fails after twice the stall timeout. *subject* begins the messages of its errors. Raises
    ConfigurationError when google-auth is not installed.
    """
    try:
        import google.auth.exceptions  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(f"store {url}: {error}: pip install 'trimsfs[gs]', or --anonymous") from error

    lock = threading.Lock()
    transport = _transport(stall_timeout_s, google.auth.exceptions.TransportError)
    default: Any = None

    failure: Any = None
    failed_at = -math.inf

    def find() -> Any:
        """The credentials. After a failure, it looks for them again only later: that can take 10 s."""
        nonlocal default, failure, failed_at
        if default is None and time.monotonic() > failed_at + LOOK_AGAIN_S:
            try:
                default = google.auth.default(scopes=SCOPES)[0]
            except google.auth.exceptions.GoogleAuthError as error:
                failure, failed_at = error, time.monotonic()
        if default is None:
            raise failure
        return default

    with contextlib.suppress(google.auth.exceptions.GoogleAuthError):
        find()  # as root

    def sign(request: Request, *, refused: Request | None = None) -> Request:
        headers = dict(request.headers)
        try:
            with lock:
                credentials = find()
                used = refused.headers["authorization"] if refused is not None else ""
                # Another thread may have renewed the token that was refused.
                if used == f"Bearer {credentials.token}" or not credentials.valid:
                    with parsing():
                        credentials.refresh(transport)
                credentials.apply(headers)
        except google.auth.exceptions.GoogleAuthError as error:
            passing = isinstance(error, google.auth.exceptions.TransportError) or getattr(error, "retryable", False)
            if passing:
                raise TransientStoreError(f"{subject}: no token: {one_line(error)}") from error
            raise StoreAccessError(f"{subject}: {one_line(error)}: {REMEDY}") from error
        return replace(request, headers=headers)

    return sign


def _transport(stall_timeout_s: float, failed: Callable[[Exception], Exception]) -> Callable[..., Any]:
    """What google-auth makes its requests by. Its own transport waits for ever for an answer that drips in."""
    client = http_client(_TOKENS, connections=1, stall_timeout_s=stall_timeout_s)

    def exchange(url: str, method: str = "GET", body: Any = None, headers: Any = None, **_: object) -> Any:
        try:
            response = client.send(method, url, headers or {}, body)
            data = client.whole(response)
        except (urllib3.exceptions.HTTPError, TransientStoreError) as error:
            raise failed(error) from error
        return SimpleNamespace(status=response.status, headers=response.headers, data=data)

    return exchange
