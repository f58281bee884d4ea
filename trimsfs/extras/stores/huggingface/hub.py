"""Requests to a Hugging Face hub: its API, and the bytes of files from where the hub sends a reader to.

huggingface_hub finds the address and the token. It does not make the requests: its calls repeat failed requests by
themselves for half a minute, which would hide an outage from the circuit breaker, and read files to disk only.
"""

import json
import re
from collections.abc import Mapping
from threading import Lock
from typing import Any
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

import urllib3
from cachetools import TTLCache

from trimsfs.errors import (
    ConfigurationError,
    ObjectChangedError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.huggingface.errors import refused
from trimsfs.extras.stores.huggingface.repositories import Repository
from trimsfs.options import MountOptions
from trimsfs.stores.http.bodies import check_range, parsing, pass_on, received
from trimsfs.stores.http.endpoints import Pools, checked_endpoint
from trimsfs.stores.http.receive_loop import HttpBody

MOST_REDIRECTS = 5
MOST_JSON = 64 << 20
"""Bytes of the longest answer of the API."""
MOST_WHOLE = 16 << 20
"""Bytes of the largest file that may come whole where a range was asked for: what precedes the range is thrown away.
Files that are in neither LFS nor Xet have at most 10 MB."""
MOST_ADDRESSES = 4096
"""Addresses of files on the CDN to remember."""
ADDRESS_TTL_S = 60.0
"""How long such an address is asked without asking the hub: another place may serve the file better by then."""
_REDIRECTS = {301, 302, 303, 307, 308}
_BYTES = {200, 206}
"""How a CDN answers with bytes of a file; else its signed address may have expired, or the place be out of order."""
_NEXT = re.compile(r'<[^>]*[?&]cursor=([^&>]+)[^>]*>;\s*rel="?next"?')

Response = urllib3.BaseHTTPResponse
Form = Mapping[str, str | list[str]] | None


class Hub:
    """A hub by its address, with the token of huggingface_hub's own chain. Its methods may be called from any thread.

    They raise StoreErrors, MalformedAnswerError, and the errors of urllib3. Raises ConfigurationError for an endpoint
    that cannot be, and where huggingface_hub is not installed.
    """

    def __init__(self, options: MountOptions, *, connections: int) -> None:
        try:
            from huggingface_hub import constants  # noqa: PLC0415 - an extra
            from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415
        except ImportError as error:
            raise ConfigurationError(f"store {options.store}: {error}: pip install 'trimsfs[hf]'") from error
        self.endpoint = checked_endpoint(options.endpoint_url or constants.ENDPOINT)
        self._origin = urlsplit(self.endpoint)[:2]
        # The token is read now: later, the server is another user, who may not read root's token file.
        headers = build_hf_headers(token=False if options.anonymous else None, library_name="trimsfs")
        self._own = {name: value for name, value in headers.items() if name.lower() == "authorization"}
        self._headers = {name: value for name, value in headers.items() if name not in self._own}
        self._has_token = bool(self._own)
        self._stall_timeout_s, self._timeout_s = options.stall_timeout, 2 * options.stall_timeout
        timeout = urllib3.Timeout(connect=options.stall_timeout, read=options.stall_timeout)
        self._pools = Pools(maxsize=connections, timeout=timeout, retries=False)
        self._addresses: TTLCache[tuple[str, str, str], str] = TTLCache(MOST_ADDRESSES, ADDRESS_TTL_S)
        self._lock = Lock()

    def ask(
        self, repository: Repository | None, path: str, query: Mapping[str, str | list[str]], form: Form = None
    ) -> tuple[Any, str | None]:
        """The JSON answer of the API to a request below ``/api``, and the cursor of its next page, if any.

        With a *form*, the request is a POST of it.
        """
        url = f"{self.endpoint}/api/{path}" + (f"?{urlencode(query, doseq=True)}" if query else "")
        response, _ = self._follow(url, {}, form)
        if response.status >= 300:
            raise self._refused(response, repository)
        data = received(response, self._timeout_s, limit=MOST_JSON)
        following = _NEXT.search(response.headers.get("link", ""))
        with parsing():
            return json.loads(data), unquote(following[1]) if following is not None else None

    def open(
        self, repository: Repository, commit: str, path: str, etag: str, start: int, length: int, size: int
    ) -> Response:
        """The answer whose body begins at byte *start* of a file of *size* bytes. The caller closes it.

        Raises ObjectChangedError if the hub tells another commit, ETag or size.
        """
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        name = (repository.path, commit, path)
        with self._lock:
            known = self._addresses.get(name)
        if known is not None:
            try:
                response = self._send(known, headers)
                if response.status in _BYTES:
                    return self._checked(response, repository, start, length, size)
            except BaseException:
                self.forget(name)  # the hub may send the next attempt to another place
                raise
            response.close()
            self.forget(name)
        url = f"{self.endpoint}/{repository.path}/resolve/{commit}/{quote(path)}"
        response, url = self._follow(url, headers, expected=(commit, etag, str(size)))
        if not self._is_own(url):
            with self._lock:
                self._addresses[name] = url
        return self._checked(response, repository, start, length, size)

    def close(self) -> None:
        """Close the connections."""
        self._pools.clear()

    def forget(self, name: tuple[str, str, str]) -> None:
        """Ask the hub where to read a file, by its repository, commit and path, when it is read next."""
        with self._lock:
            self._addresses.pop(name, None)

    def _checked(self, response: Response, repository: Repository, start: int, length: int, size: int) -> Response:
        """The answer, if its body is the range that was asked for, or the whole file up to it."""
        try:
            if response.status == 206:
                check_range(response.headers, start, length, size)
            elif response.status == 200:  # small files may come whole
                if length < size and size > MOST_WHOLE:
                    raise StoreUnavailableError(f"{repository}: the hub serves no ranges of files: check HF_ENDPOINT")
                if response.headers.get("content-length") not in {None, str(size)}:
                    raise ObjectChangedError(f"the file has {response.headers['content-length']} bytes now")
                pass_on(HttpBody(response), start, lambda _: None, stall_timeout_s=self._stall_timeout_s)
            elif response.status == 416:
                raise ObjectChangedError("the file is shorter now")
            else:
                raise self._refused(response, repository)
        except BaseException:
            response.close()
            raise
        return response

    def _refused(self, response: Response, repository: Repository | None) -> StoreError:
        return refused(response, repository, endpoint=self.endpoint, has_token=self._has_token)

    def _follow(
        self, url: str, headers: Mapping[str, str], form: Form = None, expected: tuple[str, str, str] | None = None
    ) -> tuple[Response, str]:
        """The answer behind any redirects, and its address. What the hub tells must be the commit, ETag and size
        *expected*."""
        for _ in range(MOST_REDIRECTS):
            response = self._send(url, headers, form)
            if expected is not None and self._is_own(url) and response.status < 400:
                _compare(response, *expected)
            location = response.headers.get("location")
            if response.status not in _REDIRECTS or location is None:
                return response, url
            received(response, self._timeout_s)
            with parsing():
                url = urlsplit(urljoin(url, location)).geturl()
            if self._origin[0] == "https" and not url.startswith("https:"):
                raise StoreUnavailableError(f"{self.endpoint}: it redirects to an address without TLS")
        raise TransientStoreError(f"more than {MOST_REDIRECTS} redirects")

    def _send(self, url: str, headers: Mapping[str, str], form: Form = None) -> Response:
        own = self._own if self._is_own(url) else {}  # the CDN gets no token
        typed = {} if form is None else {"Content-Type": "application/x-www-form-urlencoded"}
        with parsing():
            return self._pools.of(url).request(
                "GET" if form is None else "POST",
                url,
                headers={"Accept-Encoding": "identity", **self._headers, **own, **typed, **headers},
                preload_content=False,
                redirect=False,
                body=None if form is None else urlencode(form, doseq=True),
            )

    def _is_own(self, url: str) -> bool:
        return urlsplit(url)[:2] == self._origin


def _compare(response: Response, commit: str, etag: str, size: str) -> None:
    """Raises ObjectChangedError, and closes the answer, if the hub tells another commit, ETag or size of a file."""
    told, linked = response.headers, "x-linked-etag" in response.headers
    found = told.get("x-linked-etag") if linked else told.get("etag") if response.status in {200, 206} else None
    for name, is_now, expected in (
        ("commit", told.get("x-repo-commit"), commit),
        ("ETag", found and found.removeprefix("W/").strip('"'), etag),
        ("size", told.get("x-linked-size"), size),
    ):
        if is_now is not None and is_now != expected:
            response.close()
            raise ObjectChangedError(f"its {name} is now {is_now}")
