"""Azure Blob Storage, by its REST API: every read has If-Match with the blob's ETag, which each write changes."""

import os
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import quote, unquote
from xml.etree import ElementTree

from trimsfs.errors import ConfigurationError, ObjectNotFoundError
from trimsfs.extras.stores.cloud.azure_credentials import Account, find_account, signer
from trimsfs.extras.stores.cloud.cloud_store import CloudStore
from trimsfs.extras.stores.cloud.connections import Answer, Connections, Request, unsigned
from trimsfs.extras.stores.cloud.service import content_name, etag_of
from trimsfs.options import MountOptions
from trimsfs.stores.base import Page, moment
from trimsfs.stores.http.bodies import METADATA_THREADS
from trimsfs.types import Generation

API_VERSION = {"x-ms-version": "2021-12-02"}
"""Of the REST API: the oldest that encodes names that XML cannot hold."""
_CONTAINER = re.compile(r"\$root|\$web|[a-z0-9](?:-?[a-z0-9]){2,62}")


def open_container(url: str, options: MountOptions, *, max_requests: int) -> CloudStore:
    """The store ``az://CONTAINER[/PREFIX]``, or ``abfss://CONTAINER@ACCOUNT.dfs.core.windows.net[/PREFIX]``.

    Raises ConfigurationError.
    """
    place, _, prefix = url.partition("://")[2].partition("/")  # not parsed as a URL: a prefix may hold any character
    container, _, host = place.partition("@")
    if not _CONTAINER.fullmatch(container):
        raise ConfigurationError(f"store {url!r}: {container!r} is not a container name: write az://CONTAINER[/PREFIX]")
    account = find_account(url, host, options.endpoint_url, os.environ)
    service = AzureBlobs(account, container)
    connections = Connections(
        account.endpoint,
        unsigned if options.anonymous else signer(account, service.subject, url, options.stall_timeout),
        connections=max_requests + METADATA_THREADS,
        stall_timeout_s=options.stall_timeout,
    )
    return CloudStore(service, connections, prefix, max_requests=max_requests, stall_timeout_s=options.stall_timeout)


class AzureBlobs:
    """A container."""

    product = "Azure Blob Storage"
    remedy = (
        "check the credentials: AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN, or a role such as Storage Blob Data Reader"
    )

    def __init__(self, account: Account, container: str) -> None:
        self.subject = f"container {container} of account {account.name}"
        self.url = f"{account.endpoint}|az://{container}"
        self._path = f"{account.path}/{container}"

    def listing(self, prefix: str, token: str | None, limit: int) -> Request:
        query = {"restype": "container", "comp": "list", "prefix": prefix, "delimiter": "/", "maxresults": str(limit)}
        if token is not None:
            query["marker"] = token
        return Request(path=self._path, query=query, headers=API_VERSION)

    def listed(self, answer: Answer, prefix: str) -> Page:
        root = ElementTree.fromstring(answer.body.removeprefix(b"\xef\xbb\xbf"))  # noqa: S314 - expat bounds entities
        if root.tag != "EnumerationResults":
            raise ValueError("not a listing")
        blobs = [(_text(blob, "Name"), blob) for blob in root.iterfind("Blobs/Blob")]
        return Page(
            objects=tuple(
                _generation(name, _properties(blob)) for name, blob in blobs if name != prefix and not _directory(blob)
            ),
            prefixes=tuple(_text(name, "Name") for name in root.iterfind("Blobs/BlobPrefix")),
            next_token=root.findtext("NextMarker") or None,
            empty=any(name == prefix for name, _ in blobs),
        )

    def stat(self, key: str) -> Request:
        return Request(method="HEAD", path=self._blob(key), headers=API_VERSION)

    def generation(self, answer: Answer, key: str) -> Generation:
        if answer.headers.get("x-ms-resource-type") == "directory":
            raise ObjectNotFoundError(f"{key}: {self.subject}: a directory")
        return _generation(key, answer.headers)

    def get(self, key: str, generation: Generation, offset: int, length: int) -> Request:
        return Request(
            path=self._blob(key),
            query={} if generation.version_id is None else {"versionid": generation.version_id},
            headers={
                **API_VERSION,
                "If-Match": f'"{content_name(generation.etag)}"',
                "Range": f"bytes={offset}-{offset + length - 1}",
            },
        )

    def content(self, headers: Mapping[str, str]) -> str | None:
        etag = headers.get("etag")
        return None if etag is None else etag.strip('"')

    def version(self, headers: Mapping[str, str]) -> str | None:
        return headers.get("x-ms-version-id")

    def reason(self, answer: Answer) -> tuple[str, str]:
        code = answer.headers.get("x-ms-error-code", "")
        try:
            document = ElementTree.fromstring(answer.body.removeprefix(b"\xef\xbb\xbf"))  # noqa: S314
            # The next lines are an id and the time of the request.
            return code or document.findtext("Code") or "", (document.findtext("Message") or "").partition("\n")[0]
        except ElementTree.ParseError:
            return code, ""

    def missing(self, code: str, message: str) -> bool:
        return code in {"ContainerNotFound", "ContainerBeingDeleted"}

    def _blob(self, key: str) -> str:
        return f"{self._path}/{quote(key, safe='/~')}"


def _directory(blob: ElementTree.Element) -> bool:
    """Whether it is a directory of an account with hierarchical namespace: listings have it as a prefix, too."""
    return blob.findtext("Properties/ResourceType") == "directory"


def _properties(blob: ElementTree.Element) -> dict[str, str]:
    return {field.tag.lower(): field.text or "" for field in blob.iterfind("Properties/*")}


def _generation(key: str, about: Mapping[str, str]) -> Generation:
    return Generation(
        key=key,
        etag=etag_of(about["etag"].strip('"'), {"md5": about.get("content-md5") or None}),
        size=int(about["content-length"]),
        modified_ns=moment(int(parsedate_to_datetime(about["last-modified"]).timestamp()) * 1_000_000_000),
        version_id=about.get("x-ms-version-id"),
    )


def _text(element: ElementTree.Element, name: str) -> str:
    child = element.find(name)
    if child is None or not child.text:
        raise ValueError(f"no {name}")
    if child.get("Encoded") == "true":
        return unquote(child.text)
    return child.text
