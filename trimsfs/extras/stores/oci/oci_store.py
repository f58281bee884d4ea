"""The store of one artifact of a registry, in the layers that its tag or digest names."""

from functools import partial
from typing import TypeVar

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.concurrency.late_answers import LateAnswers
from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, StoreError, StoreUnavailableError
from trimsfs.extras.stores.oci import artifact, tar_layer
from trimsfs.extras.stores.oci.artifact import Artifact, Entries, Layer
from trimsfs.extras.stores.oci.reference import parse
from trimsfs.extras.stores.oci.registry import Registry, registry_errors
from trimsfs.extras.stores.oci.tar_layer import Member
from trimsfs.options import MountOptions
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink
from trimsfs.stores.digests import Digest
from trimsfs.stores.http.bodies import METADATA_THREADS, RequestThreads
from trimsfs.stores.http.failures import parsing
from trimsfs.stores.http.receive_loop import HttpBody
from trimsfs.text import printable
from trimsfs.types import Generation

T = TypeVar("T")

HEADER_THREADS = 4
"""Tar layers whose headers are read at once: each takes long, and other requests must not wait for them."""


class OciStore:
    """The files of one artifact, by a tag, which is resolved to a digest at each question, or by a digest.

    A file's ETag is the digest of its layer, with an offset if the layer is a tar archive. So a generation never
    changes, and can be read for as long as the registry keeps its layer, whatever the tag names by then.
    """

    streaming = True  # a layer never changes
    forkable = True
    links = False

    def __init__(self, url: str, options: MountOptions, *, max_requests: int) -> None:
        self._reference = parse(url)
        self._threads = RequestThreads(
            self._reference, registry_errors, max_requests=max_requests, stall_timeout_s=options.stall_timeout
        )
        self._registry = Registry(self._reference, options, connections=max_requests + METADATA_THREADS)
        self._headers = trio.CapacityLimiter(HEADER_THREADS)
        self._known: Artifact | None = None
        self._loading = trio.Lock()
        self._loads = LateAnswers[Artifact]()

    @property
    def identity(self) -> str:
        return str(self._reference)

    async def probe(self) -> None:
        await self._threads.ask(self._registry.resolve)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        return (await self._artifact()).page(prefix, token, limit)

    async def stat(self, key: str) -> Generation:
        generation = (await self._artifact()).file(key)
        if generation is None:
            raise ObjectNotFoundError(f"{key}: no such file in {self._reference}")
        return generation

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> None:
        location = artifact.place(generation.etag)
        if location is None:
            raise ObjectNotFoundError(f"{generation.key}: not a file of {self._reference}")
        layer, start = location
        get = partial(self._get, generation.key, layer, start + offset, length)
        await self._threads.read(get, length, sink, generation.key)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        algorithm, _, value = generation.etag.partition(":")
        whole = algorithm == "sha256" and "@" not in value
        return Digest(algorithm="sha256", value=bytes.fromhex(value)) if whole else None

    async def aclose(self) -> None:
        self._loads.close()
        self._registry.close()

    async def _artifact(self) -> Artifact:
        """The artifact that the reference names now. Its manifest and tar headers are read once."""
        if self._reference.pinned and self._known is not None:
            return self._known
        digest = (
            self._reference.reference if self._reference.pinned else await self._threads.ask(self._registry.resolve)
        )
        async with self._loading:
            if self._known is None or self._known.digest != digest:
                return await self._loads.of(digest, partial(self._load, digest))
            return self._known

    async def _load(self, digest: str) -> Artifact:
        """Read an artifact, and remember it as the one that is known: perhaps nobody waits for it any more."""
        budget = tar_layer.Budget()
        layers = await self._threads.ask(partial(self._layers, digest, budget))
        headers: dict[str, list[Member] | StoreError] = {}

        async def read_headers(layer: Layer) -> None:
            read = partial(registry_errors, partial(self._members, layer, budget))
            try:
                members = await in_thread(read, limiter=self._headers, abandon_on_cancel=True)
            except StoreError as error:
                headers[layer.digest] = error
            else:
                headers[layer.digest] = members

        async with trio.open_nursery() as nursery:
            for layer in {each.digest: each for each in layers if each.tar}.values():
                nursery.start_soon(read_headers, layer)
        self._known = await in_thread(registry_errors, partial(self._built, digest, layers, headers))
        return self._known

    def _built(self, digest: str, layers: list[Layer], headers: dict[str, list[Member] | StoreError]) -> Artifact:
        entries: Entries = {}
        for layer in layers:
            if not layer.tar:
                artifact.add_file(entries, layer)
                continue
            outcome = headers[layer.digest]
            if isinstance(outcome, StoreError):
                raise outcome
            with parsing():
                artifact.add_members(entries, layer, outcome)
        return Artifact(digest, entries, self._reference.prefix, self._known)

    def _layers(self, digest: str, budget: tar_layer.Budget) -> list[Layer]:
        subject = str(self._reference)
        with parsing():
            manifest = artifact.parsed(self._registry.manifest(digest))
            child = artifact.children(manifest, subject)
            if child is not None:
                manifest = artifact.parsed(self._registry.manifest(child))
            layers = artifact.layers(manifest, subject)
        for layer in layers:
            budget.spend(subject, files=1, text=len(layer.name) * (1 + layer.name.count("/")))
        return layers

    def _members(self, layer: Layer, budget: tar_layer.Budget) -> list[Member]:
        fetch = partial(self._registry.read, layer.digest)
        subject = f"{self._reference}: layer {printable(layer.name)}"
        try:
            with parsing():
                return list(tar_layer.members(fetch, layer.size, subject, budget))
        except ObjectNotFoundError as error:
            raise StoreUnavailableError(f"{error}: the registry lacks layer {layer.digest}: push it again") from error

    def _get(self, key: str, layer: str, offset: int, length: int) -> tuple[HttpBody, None]:
        try:
            body = self._registry.blob(layer, offset, length)
            return HttpBody(body, cut_off=partial(self._registry.forget, layer)), None
        except ObjectNotFoundError as error:
            raise ObjectChangedError(f"{key}: the registry no longer has its layer {layer}") from error
