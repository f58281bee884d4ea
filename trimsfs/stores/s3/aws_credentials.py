"""Credentials of a role, from STS: by the SDK's other credentials, or by a web identity token file."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import botocore.exceptions
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    AssumeRoleWithWebIdentityCredentialFetcher,
    DeferredRefreshableCredentials,
)
from botocore.session import Session

logging.getLogger("botocore.credentials").setLevel(logging.ERROR)
# It logs a traceback each time that credentials are refused. The error says so in one line.

SESSION_NAME = "trimsfs"
"""What the account's log shows of who has assumed a role."""
TOKEN_FILE = "web identity token file"  # noqa: S105 - as messages call it


def assume_role(
    session: Session, role_arn: str, *, token_file: Path | None, region: str | None, timeout_s: float, connect_s: float
) -> None:
    """Have a session's requests use a role's credentials, which STS is asked for with the first request.

    The address of STS is the SDK's, or that of AWS_ENDPOINT_URL_STS. Raises the SDK's errors.
    """
    config = Config(
        connect_timeout=connect_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": 1},
        signature_version=None if token_file is None else UNSIGNED,
    )
    region = region or session.get_config_variable("region") or "us-east-1"

    def sts(*_service: str, **keys: Any) -> Any:
        return session.create_client("sts", **{"region_name": region, **keys, "config": config})

    # Makes a client now: what it reads of the SDK's data may be unreadable after the server has dropped privileges.
    sts(aws_access_key_id="none", aws_secret_access_key="none")  # noqa: S106
    session_name = {"RoleSessionName": SESSION_NAME}
    fetcher: AssumeRoleCredentialFetcher | AssumeRoleWithWebIdentityCredentialFetcher
    if token_file is not None:
        fetcher = AssumeRoleWithWebIdentityCredentialFetcher(sts, partial(_token, token_file), role_arn, session_name)
    else:
        source = session.get_credentials()
        if source is None:
            raise botocore.exceptions.NoCredentialsError
        fetcher = AssumeRoleCredentialFetcher(sts, source, role_arn, session_name)
    credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")
    session._credentials = credentials  # type: ignore[attr-defined] # the SDK sets only fixed keys


def _token(file: Path) -> str:
    """The token of now: who issues it replaces the file."""
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise botocore.exceptions.CredentialRetrievalError(
            provider=f"{TOKEN_FILE} {file}", error_msg=str(reason)
        ) from error
