"""The SDK's client for a mount's options."""

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
from botocore import UNSIGNED
from botocore.config import Config
from botocore.session import Session

from trimsfs.errors import ConfigurationError
from trimsfs.options import MountOptions
from trimsfs.stores.s3.credentials import assume_role
from trimsfs.stores.s3.sdk_data import use_less
from trimsfs.stores.s3.timestamps import parsed

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT_S = 3.0


def make_client(options: MountOptions, connections: int) -> "S3Client":
    """A client that tries each request once. Raises ConfigurationError for invalid options."""
    if options.endpoint_url is not None:
        _check_endpoint(options.endpoint_url)
    if options.region is not None and not re.fullmatch("[A-Za-z0-9-]+", options.region):
        raise ConfigurationError(f"S3: region {options.region!r} is not a region")
    config = Config(
        signature_version=UNSIGNED if options.anonymous else None,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=options.stall_timeout,
        max_pool_connections=connections,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": options.addressing_style},
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = Session(profile=options.profile)
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
        client = boto3.Session(botocore_session=session, region_name=region).client(
            "s3", endpoint_url=options.endpoint_url, config=config
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"S3: {error}") from error
    client.meta.events.register_last("before-parameter-build.s3", _ask_for_the_region_once)
    return client


def _ask_for_the_region_once(model: Any, context: dict[str, Any], **_: object) -> None:
    """Prevent an endless loop: on a redirect, the SDK sends HeadBucket to learn the region, and would redirect that."""
    if model.name == "HeadBucket":
        context["s3_redirect"]["redirected"] = True


def _check_endpoint(url: str) -> None:
    try:
        parts = urlsplit(url)
        port_error = "" if parts.port is None or parts.port else "port 0"
    except ValueError as error:
        raise ConfigurationError(f"S3: endpoint URL {_shown(url)}: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(f"S3: endpoint URL {_shown(url)}: credentials do not belong there")
    if parts.scheme not in {"http", "https"} or not parts.hostname or port_error or re.search(r"\s", url):
        raise ConfigurationError(f"S3: endpoint URL {_shown(url)!r}: write http://HOST[:PORT] or https://HOST[:PORT]")


def _shown(url: str) -> str:
    """A URL without a user and password."""
    return re.sub(r"//[^/]*@", "//***@", url)
