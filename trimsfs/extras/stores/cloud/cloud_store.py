"""The store of a cloud service's container, or of a prefix of one."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from trimsfs.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.cloud.connections import Answer, Connections, Request
from trimsfs.extras.stores.cloud.service import Service, content_name, digest_of, error_of
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink
from trimsfs.stores.digests import Digest
from trimsfs.stores.http.bodies import RequestThreads, check_range
from trimsfs.stores.http.failures import MalformedAnswerError, parsing, translated
from trimsfs.stores.http.receive_loop import HttpBody
from trimsfs.types import Generation

T = TypeVar("T")

KEY_MAX = 1024
"""Characters of the longest key that any of these services allows."""
EMPTY_PAGES = 100
"""Pages without a name after which a listing fails. The services may send some, and go on."""


class CloudStore:
    """The objects of a container under a prefix.

    Every read names the content that it wants, and its answer is checked before its bytes, so that two generations
    never mix. Requests are tried once: RetryingStore retries them.
    """

    streaming = True  # the answer names its content before the bytes
    forkable = True
    links = False

    def __init__(
        self, service: Service, connections: Connections, prefix: str, *, max_requests: int, stall_timeout_s: float
    ) -> None:
        self._service = service
        self._connections = connections
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._threads = RequestThreads(
            service.subject, self._translated, max_requests=max_requests, stall_timeout_s=stall_timeout_s
        )

    @property
    def identity(self) -> str:
        return f"{self._service.url}/{self._prefix}"

    async def probe(self) -> None:
        await self._threads.ask(partial(self._list, "", None, 1))

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        if not _possible(self._prefix + prefix):
            return Page(objects=(), prefixes=(), next_token=None)
        for _ in range(EMPTY_PAGES):
            page = await self._threads.ask(partial(self._list, prefix, token, limit), prefix)
            if page.exists or page.next_token is None:
                return page
            if page.next_token == token:
                problem = f"the listing of /{prefix} has no end: it repeats a page without a name"
                raise StoreUnavailableError(f"{self._service.subject}: {problem}: tell who runs the store")
            token = page.next_token
        raise TransientStoreError(f"{self._service.subject}: the listing has {EMPTY_PAGES} pages without a name")

    async def stat(self, key: str) -> Generation:
        if not _possible(self._prefix + key):
            raise ObjectNotFoundError(f"{key!r} is not a valid key")
        return await self._threads.ask(partial(self._stat, key), key)

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        try:
            get = partial(self._get, generation, offset, length)
            return await self._threads.read(get, length, sink, generation.key)
        except ObjectNotFoundError:
            if (await self.stat(generation.key)).etag == generation.etag:
                raise TransientStoreError(f"{generation.key}: not found, though the store has it") from None
            raise ObjectChangedError(f"{generation.key}: {self._service.subject} has another content of it") from None

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        return digest_of(generation.etag)  # without a request

    async def aclose(self) -> None:
        self._connections.close()

    def _translated(self, function: Callable[[], T], key: str) -> T:
        """Call *function*. Raises StoreErrors of one line, which show nothing that was sent."""
        subject = f"{key}: {self._service.subject}" if key else self._service.subject

        def malformed(error: MalformedAnswerError) -> StoreError:
            if "header value" in str(error):
                # Without the cause: its text is the header, which contains the credentials.
                message = f"{subject}: the credentials contain a character that cannot be sent: check them"
                raise StoreAccessError(message) from None
            message = f"{subject}: the answer is not from {self._service.product}: check the endpoint"
            return StoreUnavailableError(message)

        return translated(function, malformed)

    def _ask(self, request: Request, key: str = "") -> Answer:
        answer = self._connections.ask(request)
        if answer.status != 200:
            raise self._refused(answer, key)
        return answer

    def _refused(self, answer: Answer, key: str) -> StoreError:
        with parsing():
            return error_of(self._service, answer, key)

    def _list(self, prefix: str, token: str | None, limit: int) -> Page:
        whole = self._prefix + prefix
        answer = self._ask(self._service.listing(whole, token, min(limit, PAGE_LIMIT)))
        with parsing():
            page = self._service.listed(answer, whole)
        strip = len(self._prefix)
        return replace(
            page,
            objects=tuple(replace(generation, key=generation.key[strip:]) for generation in page.objects),
            prefixes=tuple(name[strip:] for name in page.prefixes),
            empty=not whole or page.empty,  # a container exists even if it is empty
        )

    def _stat(self, key: str) -> Generation:
        whole = self._prefix + key
        answer = self._ask(self._service.stat(whole), key)
        with parsing():
            return replace(self._service.generation(answer, whole), key=key)

    def _get(self, generation: Generation, offset: int, length: int) -> tuple[HttpBody, str | None]:
        """The body, unread, and the version id of the bytes, once its headers match the request."""
        raw = self._connections.send(self._service.get(self._prefix + generation.key, generation, offset, length))
        try:
            if raw.status not in {200, 206}:
                raise self._refused(self._connections.whole(raw), generation.key)
            check_range(raw.headers if raw.status == 206 else {}, offset, length, generation.size)
            content = self._service.content(raw.headers)
            if content is None:
                message = "the answer does not name its content: check the endpoint"
                raise StoreUnavailableError(f"{generation.key}: {self._service.subject}: {message}")
            if content != content_name(generation.etag):
                raise ObjectChangedError(f"{generation.key}: {self._service.subject} has another content: {content}")
            return HttpBody(raw), self._service.version(raw.headers)
        except BaseException:
            raw.close()
            raise


def _possible(key: str) -> bool:
    """Whether a name can be a key.

    Names from the kernel are any bytes, with undecodable ones as surrogates. Servers and clients resolve dots in URLs:
    they would lead out of the prefix.
    """
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return len(key) <= KEY_MAX and {".", ".."}.isdisjoint(key.split("/"))
