"""Requests to a Hugging Face hub: its API, and the bytes of files from where the hub sends a reader to.

huggingface_hub finds the address and the token. It does not make the requests: its calls read files to disk only. They
also repeat failed requests for half a minute, which would hide an outage from the circuit breaker.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote, unquote, urlencode

from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.huggingface.repositories import Repository
from trimsfs.options import MountOptions
from trimsfs.stores.http.bodies import check_range, pass_on
from trimsfs.stores.http.endpoints import checked_endpoint
from trimsfs.stores.http.failures import kind_of, parsing, unsigned_line
from trimsfs.stores.http.http_client import Headers, HttpClient, Response, same_service
from trimsfs.stores.http.receive_loop import HttpBody

MOST_JSON = 64 << 20
"""Bytes of the longest answer of the API."""
MOST_WHOLE = 16 << 20
"""Bytes of the largest file that may come whole where a range was asked for: what precedes the range is thrown away.
Files that are in neither LFS nor Xet have at most 10 MB."""
_NEXT = re.compile(r'<[^>]*[?&]cursor=([^&>]+)[^>]*>;\s*rel="?next"?')

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
        # The token is read now: later, the server is another user, who may not read root's token file.
        headers = build_hf_headers(token=False if options.anonymous else None, library_name="trimsfs")
        self._own = {name: value for name, value in headers.items() if name.lower() == "authorization"}
        others = {name: value for name, value in headers.items() if name not in self._own}
        self._headers = {"Accept-Encoding": "identity", **others}
        self._has_token = bool(self._own)
        self._stall_timeout_s = options.stall_timeout
        stall_s = options.stall_timeout
        self._client = HttpClient(
            self.endpoint, connections=connections, stall_timeout_s=stall_s, connect_timeout_s=stall_s
        )
        self.forget = self._client.forget

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
        data = self._client.whole(response, limit=MOST_JSON)
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
        response = self._client.at_place(name, {**self._headers, **headers})
        if response is None:
            url = f"{self.endpoint}/{repository.path}/resolve/{commit}/{quote(path)}"
            response, at = self._follow(url, headers, look=partial(_compare, commit=commit, etag=etag, size=str(size)))
            if not same_service(at, url):
                self._client.remember(name, at)
        try:
            self._check(response, repository, start, length, size)
        except BaseException:
            response.close()
            self.forget(name)
            raise
        return response

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _check(self, response: Response, repository: Repository, start: int, length: int, size: int) -> None:
        """Raises StoreErrors unless a body is the range that was asked for, or the whole file, read up to it."""
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

    def _refused(self, response: Response, repository: Repository | None) -> StoreError:
        """The error that an answer without success tells, with its remedy. Closes the answer."""
        status, code = response.status, response.headers.get("x-error-code", "")
        message = unsigned_line(response.headers.get("x-error-message") or f"HTTP status {status}")
        response.close()
        subject = str(repository) if repository is not None else self.endpoint
        if code == "GatedRepo":
            where = f" at {self.endpoint}/{repository.path}" if repository is not None else ""
            token = "with the account of the token" if self._has_token else "and set HF_TOKEN, or run `hf auth login`"
            return StoreAccessError(f"{subject}: gated: accept its terms{where} {token}")
        if code == "RepoNotFound":
            remedy = "check the spelling" + ("" if self._has_token else ", or set HF_TOKEN if it is private")
            return BucketNotFoundError(f"{subject} does not exist: {remedy}")
        if code == "RevisionNotFound":
            return BucketNotFoundError(f"{subject}: this revision does not exist: {message}: check the spelling")
        if status in {401, 403}:
            remedy = "HF_TOKEN is not accepted: renew it" if self._has_token else "set HF_TOKEN, or run `hf auth login`"
            return StoreAccessError(f"{subject}: {message}: {remedy}")
        kind = kind_of(status)
        message_alone = kind is ObjectNotFoundError or issubclass(kind, TransientStoreError)
        return kind(message if message_alone else f"{subject}: {message}")

    def _follow(
        self, url: str, headers: Headers, form: Form = None, look: Callable[[Response], None] = lambda _: None
    ) -> tuple[Response, str]:
        """The answer behind any redirects, and its address. *look* may refuse answers of the hub itself."""
        typed = {} if form is None else {"Content-Type": "application/x-www-form-urlencoded"}
        return self._client.follow(
            "GET" if form is None else "POST",
            url,
            {**self._headers, **typed, **headers},
            self._own,  # the CDN gets no token
            self.endpoint,
            body=None if form is None else urlencode(form, doseq=True),
            look=look,
        )


def _compare(response: Response, commit: str, etag: str, size: str) -> None:
    """Raises ObjectChangedError, and closes the answer, if the hub tells another commit, ETag or size of a file."""
    if response.status >= 400:
        return
    headers = response.headers
    etag_now = headers.get("x-linked-etag")
    if etag_now is None and response.status in {200, 206}:
        etag_now = headers.get("etag")
    for name, is_now, expected in (
        ("commit", headers.get("x-repo-commit"), commit),
        ("ETag", etag_now and etag_now.removeprefix("W/").strip('"'), etag),
        ("size", headers.get("x-linked-size"), size),
    ):
        if is_now is not None and is_now != expected:
            response.close()
            raise ObjectChangedError(f"its {name} is now {is_now}")
