"""The SDK's client for a mount's options."""

import base64
import hashlib
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
from botocore import UNSIGNED
from botocore.config import Config
from botocore.httpsession import get_cert_path
from botocore.session import Session

from trimsfs.errors import ConfigurationError
from trimsfs.options import MountOptions
from trimsfs.stores.http.bodies import CONNECT_TIMEOUT_S
from trimsfs.stores.http.endpoints import checked_endpoint
from trimsfs.stores.s3.aws_credentials import assume_role
from trimsfs.stores.s3.s3_errors import by_sdk
from trimsfs.stores.s3.sdk_data import use_less
from trimsfs.stores.s3.timestamps import parsed

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

JOINING_S = 60.0
"""How long a store may take to answer a writer."""
CUSTOMER_KEY = "x-amz-server-side-encryption-customer"
"""How the headers about the key of SSE-C begin."""
KEY_BYTES = 32
_WITH_KEY = ("GetObject", "HeadObject", "PutObject")
_PARTS_WITH_KEY = ("CreateMultipartUpload", "UploadPart", "ListParts", "CompleteMultipartUpload")
"""The operations for which the store needs the key of SSE-C; the last two as the parts have checksums."""
_THIS_HOST = {"127.0.0.1", "::1", "localhost"}


def make_client(options: MountOptions, connections: int, *, writes: bool = False) -> "S3Client":
    """A client that tries each request once. Raises ConfigurationError for invalid options.

    One that *writes* knows all of S3's operations, and waits longer: a store may take long to join parts.
    """
    if options.endpoint_url is not None:
        checked_endpoint(options.endpoint_url)
    if options.transfer_acceleration and (options.endpoint_url is not None or options.addressing_style == "path"):
        other = "--endpoint-url" if options.endpoint_url is not None else "--addressing-style path"
        raise ConfigurationError(f"option --transfer-acceleration: AWS has one endpoint for it: leave out {other}")
    if options.region is not None and not re.fullmatch("[A-Za-z0-9-]+", options.region):
        raise ConfigurationError(f"S3: region {options.region!r} is not a region")
    headers = _headers(options, writes)
    config = Config(
        signature_version=UNSIGNED if options.anonymous else None,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=max(options.stall_timeout, JOINING_S) if writes else options.stall_timeout,
        max_pool_connections=connections,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": options.addressing_style, "use_accelerate_endpoint": options.transfer_acceleration},
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = Session(profile=options.profile)
        if not writes:
            use_less(session)
        region = options.region or session.get_config_variable("region")
        if region is None and options.endpoint_url is not None:
            region = "us-east-1"  # a server other than AWS seldom cares, but a signature needs some region
        if options.role_arn is not None:
            assume_role(
                session,
                options.role_arn,
                token_file=options.web_identity_token_file,
                region=region,
                timeout_s=options.stall_timeout,
                connect_s=CONNECT_TIMEOUT_S,
            )
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parsed)
        client: Any = boto3.Session(botocore_session=session, region_name=region).client(
            "s3", endpoint_url=options.endpoint_url, config=config
        )
    except botocore.exceptions.ProfileNotFound as error:
        raise ConfigurationError(f"S3: {error}: see `aws configure list-profiles`") from error
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"S3: {error}") from error
    for operation, added in headers.items():
        client.meta.events.register(f"before-call.s3{operation}", partial(_add, added))
    client.meta.events.register_last("before-parameter-build.s3", _ask_for_the_region_once)
    client._make_api_call = by_sdk()(client._make_api_call)  # what all its methods call
    return client  # type: ignore[no-any-return]


def ca_file(client: "S3Client") -> str:
    """The file of the authorities by which a client verifies the store's certificate."""
    session: Any = client._endpoint.http_session  # type: ignore[attr-defined]  # it has no public name
    return str(get_cert_path(session._verify))


def _headers(options: MountOptions, writes: bool) -> dict[str, dict[str, str]]:
    """The headers to add to requests, by the operation; an empty one stands for all. Raises ConfigurationError."""
    headers = {} if writes else {".CreateSession": {"x-amz-create-session-mode": "ReadOnly"}}
    if options.requester_pays:
        headers[""] = {"x-amz-request-payer": "requester"}
    if options.sse_c_key_file is not None:
        key = _customer_key(options.sse_c_key_file)
        _check_secrecy(options.endpoint_url)
        about = {
            f"{CUSTOMER_KEY}-algorithm": "AES256",
            f"{CUSTOMER_KEY}-key": base64.b64encode(key).decode(),
            f"{CUSTOMER_KEY}-key-md5": base64.b64encode(hashlib.md5(key, usedforsecurity=False).digest()).decode(),
        }
        headers |= {f".{operation}": about for operation in (*_WITH_KEY, *_PARTS_WITH_KEY)}
    return headers


def _add(headers: dict[str, str], params: dict[str, Any], **_: object) -> None:
    params["headers"].update(headers)


def _customer_key(file: Path) -> bytes:
    """The key in a file, raw or in base64."""
    try:
        content = file.read_bytes()
        key = content if len(content) == KEY_BYTES else base64.b64decode(content.strip(), validate=True)
    except OSError as error:
        raise ConfigurationError(f"option --sse-c-key-file: {file}: {error.strerror}") from error
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigurationError(
            f"option --sse-c-key-file: {file}: is not a key of {KEY_BYTES} bytes: run `openssl rand -base64 32`"
        )
    return key


def _check_secrecy(endpoint_url: str | None) -> None:
    """Refuse to send a key over a network without TLS. Raises ConfigurationError."""
    parts = urlsplit(endpoint_url or "https://")
    if parts.scheme == "http" and parts.hostname not in _THIS_HOST:
        raise ConfigurationError(
            f"option --sse-c-key-file: endpoint URL {endpoint_url}: the key would be sent in clear text: write https://"
        )


def _ask_for_the_region_once(model: Any, context: dict[str, Any], **_: object) -> None:
    """Prevent an endless loop: on a redirect, the SDK sends HeadBucket to learn the region, and would redirect that."""
    if model.name == "HeadBucket":
        context["s3_redirect"]["redirected"] = True
