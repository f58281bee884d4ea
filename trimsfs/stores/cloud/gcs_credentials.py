"""Google's application default credentials: a key file, the user's login, workload identity, or the metadata server."""

import contextlib
import math
import threading
import time
from dataclasses import replace
from typing import Any

from trimsfs.errors import ConfigurationError, StoreAccessError, TransientStoreError
from trimsfs.stores.cloud.connections import Request, Sign, pool_manager
from trimsfs.stores.cloud.service import one_line

REMEDY = "check the credentials: `gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS"
SCOPES = ("https://www.googleapis.com/auth/devstorage.read_only",)
LOOK_AGAIN_S = 30
"""Seconds after which missing credentials are looked for again: a metadata server may answer by then."""
_TOKENS = "https://oauth2.googleapis.com"


def default_credentials(subject: str, url: str) -> Sign:
    """Signs requests with the credentials that google-auth finds: now, as root, or when the first request needs them.

    *subject* begins the messages of its errors. Raises ConfigurationError when google-auth is not installed.
    """
    try:
        import google.auth.exceptions  # noqa: PLC0415 - an extra
        import google.auth.transport.urllib3  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(f"store {url}: {error}: pip install 'trimsfs[gs]', or --anonymous") from error

    lock = threading.Lock()
    untyped: Any = google.auth.transport.urllib3
    transport = untyped.Request(pool_manager(_TOKENS, 1))
    found: Any = None

    failure: Any = None
    failed_at = -math.inf

    def find() -> Any:
        """The credentials. After a failure, it looks for them again only later: that can take 10 s."""
        nonlocal found, failure, failed_at
        if found is None and time.monotonic() > failed_at + LOOK_AGAIN_S:
            try:
                found = google.auth.default(scopes=SCOPES)[0]
            except google.auth.exceptions.GoogleAuthError as error:
                failure, failed_at = error, time.monotonic()
        if found is None:
            raise failure
        return found

    with contextlib.suppress(google.auth.exceptions.GoogleAuthError):
        find()  # as root

    def sign(request: Request, *, renew: bool = False) -> Request:
        headers = dict(request.headers)
        try:
            with lock:
                credentials = find()
                if renew or not credentials.valid:
                    credentials.refresh(transport)
                credentials.apply(headers)
        except google.auth.exceptions.GoogleAuthError as error:
            passing = isinstance(error, google.auth.exceptions.TransportError) or getattr(error, "retryable", False)
            if passing:
                raise TransientStoreError(f"{subject}: no token: {one_line(error)}") from error
            raise StoreAccessError(f"{subject}: {one_line(error)}: {REMEDY}") from error
        return replace(request, headers=headers)

    return sign
