"""Azure's accounts and credentials: the variables of the ``az`` command, or the chain of azure-identity."""

import base64
import binascii
import hashlib
import hmac
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from trimsfs.errors import ConfigurationError, StoreAccessError, TransientStoreError
from trimsfs.extras.stores.cloud.connections import Request, Sign
from trimsfs.stores.http.bodies import CONNECT_TIMEOUT_S
from trimsfs.stores.http.endpoints import checked_endpoint
from trimsfs.stores.http.failures import one_line, parsing

SUFFIX = "core.windows.net"
SCOPE = "https://storage.azure.com/.default"
RENEW_S = 300
"""Seconds before its end at which a token is renewed."""
_DEVELOPMENT = (
    "AccountName=devstoreaccount1;BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1;AccountKey="
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""What ``UseDevelopmentStorage=true`` stands for, by Azure's documentation."""
_SIGNED = (
    *("content-encoding", "content-language", "content-length", "content-md5", "content-type", "date"),
    *("if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range"),
)
"""The headers of a signature, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A storage account. Of key and SAS token at most one is used, the key first; with neither, azure-identity's."""

    name: str
    endpoint: str
    key: bytes | None = None
    sas: str | None = None

    @property
    def path(self) -> str:
        """The path of the endpoint: an emulator's has the account's name."""
        return urlsplit(self.endpoint).path.rstrip("/")


def find_account(url: str, host: str, endpoint: str | None, environment: Mapping[str, str]) -> Account:
    """The account that *host* in the store's URL, the endpoint, or else the environment names.

    Raises ConfigurationError when nothing names one, its endpoint is no URL, or its key no base64.
    """
    fields = _connection_string(url, environment.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    name = host.partition(".")[0] or fields.get("AccountName") or environment.get("AZURE_STORAGE_ACCOUNT")
    key = fields.get("AccountKey") or environment.get("AZURE_STORAGE_KEY")
    sas = fields.get("SharedAccessSignature") or environment.get("AZURE_STORAGE_SAS_TOKEN")
    if endpoint is None and "." in host:
        endpoint = f"https://{host.replace('.dfs.', '.blob.', 1)}"
    elif endpoint is None and not host:
        endpoint = fields.get("BlobEndpoint")
    if endpoint is None and name:
        scheme, suffix = fields.get("DefaultEndpointsProtocol", "https"), fields.get("EndpointSuffix", SUFFIX)
        endpoint = f"{scheme}://{name}.blob.{suffix}"
    if endpoint is not None:
        endpoint = checked_endpoint(endpoint)
    if not name and endpoint:
        parts = urlsplit(endpoint)
        name = parts.path.strip("/") or (parts.hostname or "").partition(".")[0]
    if not name or not endpoint:
        raise ConfigurationError(f"store {url}: no storage account: set AZURE_STORAGE_ACCOUNT, or --endpoint-url")
    try:
        decoded = base64.b64decode(key, validate=True) if key else None
    except (binascii.Error, ValueError):
        raise ConfigurationError(f"store {url}: the account key is not base64: check AZURE_STORAGE_KEY") from None
    return Account(name=name, endpoint=endpoint, key=decoded, sas=sas.lstrip("?") if sas else None)


def _connection_string(url: str, text: str) -> dict[str, str]:
    fields = dict(field.partition("=")[::2] for field in text.strip().strip(";").split(";") if field)
    if fields.get("UseDevelopmentStorage", "").lower() == "true":
        return _connection_string(url, _DEVELOPMENT)
    if fields and not fields.keys() & {"AccountName", "BlobEndpoint"}:
        raise ConfigurationError(f"store {url}: no AccountName in AZURE_STORAGE_CONNECTION_STRING: check it")
    return fields


def signer(account: Account, subject: str, url: str, stall_timeout_s: float) -> Sign:
    """Signs requests for an account. A token service has the stall timeout for its answer. *subject* begins the
    messages of its errors.

    Raises ConfigurationError when the account has neither key nor SAS token and azure-identity is not installed.
    """
    if account.key is not None:
        return _shared_key(account.name, account.key)
    if account.sas is not None:
        return _with_sas(account.sas)
    return _with_token(subject, url, stall_timeout_s)


def _with_sas(sas: str) -> Sign:
    token = dict(parse_qsl(sas, keep_blank_values=True))

    def sign(request: Request, *, refused: Request | None = None) -> Request:
        return replace(request, query={**request.query, **token})

    return sign


def _shared_key(account: str, key: bytes) -> Sign:
    """Shared Key authorization, as Azure's documentation of the REST API describes it."""

    def sign(request: Request, *, refused: Request | None = None) -> Request:
        headers = {**request.headers, "x-ms-date": formatdate(usegmt=True)}
        by_name = {name.lower(): value for name, value in headers.items()}
        lines = [request.method, *(by_name.get(name, "") for name in _SIGNED)]
        lines += [f"{name}:{value}" for name, value in sorted(by_name.items()) if name.startswith("x-ms-")]
        lines += [f"/{account}{request.path}"]
        lines += [f"{name}:{value}" for name, value in sorted(request.query.items())]
        signature = hmac.digest(key, "\n".join(lines).encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {account}:{base64.b64encode(signature).decode()}"
        return replace(request, headers=headers)

    return sign


def _with_token(subject: str, url: str, stall_timeout_s: float) -> Sign:
    try:
        from azure.core.exceptions import AzureError, ClientAuthenticationError  # noqa: PLC0415 - an extra
        from azure.identity import DefaultAzureCredential  # noqa: PLC0415
    except ImportError as error:
        remedy = "pip install 'trimsfs[az]', or set AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or --anonymous"
        raise ConfigurationError(f"store {url}: {error}: {remedy}") from error

    # The library's default is 300 s, for which all requests would wait for the lock.
    chain = partial(DefaultAzureCredential, connection_timeout=CONNECT_TIMEOUT_S, read_timeout=stall_timeout_s)
    credential = chain()
    lock = threading.Lock()
    token: Any = None

    def sign(request: Request, *, refused: Request | None = None) -> Request:
        nonlocal credential, token
        try:
            with lock:
                if refused is not None and refused.headers["Authorization"] == f"Bearer {token.token}":
                    credential, token = chain(), None  # which has no tokens in memory
                if token is None or token.expires_on < time.time() + RENEW_S:
                    with parsing():
                        token = credential.get_token(SCOPE)
                value = token.token
        except ClientAuthenticationError as error:
            remedy = "run `az login`, assign an identity, or set AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN"
            raise StoreAccessError(f"{subject}: {one_line(error)}: {remedy}") from error
        except AzureError as error:
            raise TransientStoreError(f"{subject}: no token: {one_line(error)}") from error
        return replace(request, headers={**request.headers, "Authorization": f"Bearer {value}"})

    return sign
