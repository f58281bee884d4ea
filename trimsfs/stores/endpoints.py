"""Endpoints of stores over HTTP, as options and the environment name them."""

import re
from urllib.parse import urlsplit

from trimsfs.errors import ConfigurationError


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
