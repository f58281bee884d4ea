"""Endpoints of stores over HTTP, as options and the environment name them, and the way to them by proxies."""

import http.client
import re
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection

from trimsfs.errors import ConfigurationError, StoreStalledError, TransientStoreError

MOST_INTERIM = 16
"""Interim answers (1xx) that may come before an answer."""


class _FinalResponse(http.client.HTTPResponse):
    """The answer to a request. Python's own class passes over ``100 Continue`` alone, and takes any other interim
    answer, as ``103 Early Hints``, for the answer."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MOST_INTERIM + 1):
            version, status, reason = super()._read_status()  # type: ignore[misc]  # as botocore overrides it
            if not 100 <= status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException(f"more than {MOST_INTERIM} interim answers")


HTTPConnection.response_class = _FinalResponse  # of the SDK's connections, too, which are made from these

UNANSWERED = (urllib3.exceptions.HTTPError, OSError)
"""What urllib3 raises on a request without a whole answer."""


def unanswered(error: Exception, told: str) -> TransientStoreError:
    """The error for one of UNANSWERED, whose text is *told*."""
    late = isinstance(error, urllib3.exceptions.TimeoutError | TimeoutError)
    if late and not isinstance(error, urllib3.exceptions.NewConnectionError):  # to urllib3 a timeout, too
        return StoreStalledError(f"timeout: {told}")
    return TransientStoreError(told)


def checked_endpoint(url: str) -> str:
    """An endpoint's URL without a slash at its end. Raises ConfigurationError unless it is one."""
    shown = re.sub(r"\?.*", "?***", re.sub(r"//[^/]*@", "//***@", url))
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment or re.search(r"\s", url):
        raise ConfigurationError(f"endpoint URL {shown!r}: write https://HOST[:PORT] or http://HOST[:PORT]")
    return url.rstrip("/")


class Pools:
    """Connections, through the proxies that the environment names (``HTTPS_PROXY``, ``NO_PROXY``)."""

    def __init__(self, **settings: Any) -> None:
        self._direct = urllib3.PoolManager(**settings)
        try:
            self._proxied = {
                scheme: urllib3.ProxyManager(proxy, proxy_headers=_proxy_headers(proxy), **settings)
                for scheme, proxy in getproxies().items()
                if scheme in {"http", "https"} and proxy
            }
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise ConfigurationError("the proxy in HTTP_PROXY or HTTPS_PROXY is not http://HOST:PORT") from error

    def of(self, url: str) -> urllib3.PoolManager:
        """The connections for a URL."""
        parts = urlsplit(url)
        if proxy_bypass(parts.hostname or ""):
            return self._direct
        return self._proxied.get(parts.scheme, self._direct)

    def clear(self) -> None:
        """Close the connections that are not in use."""
        for pool in (self._direct, *self._proxied.values()):
            pool.clear()


def _proxy_headers(proxy: str) -> Any:
    parts = urlsplit(proxy)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return urllib3.make_headers(proxy_basic_auth=f"{user}:{password}") if user else None
