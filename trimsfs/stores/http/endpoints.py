"""Endpoints of stores over HTTP, as options and the environment name them, and the way to them by proxies."""

import re
from collections.abc import Collection
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from trimsfs.errors import ConfigurationError


def checked_endpoint(url: str) -> str:
    """An endpoint's URL without a slash at its end. Raises ConfigurationError unless it is one."""
    shown = re.sub(r"\?.*", "?***", re.sub(r"//[^/]*@", "//***@", url))
    try:
        parts = urlsplit(url)
        reason = "" if parts.username is None else "credentials do not belong there: "
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0 and not reason
    except ValueError:
        usable, reason = False, ""
    if not usable or parts.query or parts.fragment or re.search(r"\s", url):
        raise ConfigurationError(f"endpoint URL {shown!r}: {reason}write https://HOST[:PORT] or http://HOST[:PORT]")
    return url.rstrip("/")


class Pools:
    """Connections, through the proxies that the environment names (``HTTPS_PROXY``, ``NO_PROXY``) for *schemes*."""

    def __init__(self, schemes: Collection[str], **settings: Any) -> None:
        self._direct = urllib3.PoolManager(**settings)
        try:
            self._proxied = {
                scheme: urllib3.ProxyManager(proxy, proxy_headers=_proxy_headers(proxy), **settings)
                for scheme, proxy in getproxies().items()
                if scheme in schemes and proxy
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
