"""Tokens of pods' service accounts: kept where a mount's server reads them, to read a store with the account's role.

A path of a mount belongs to a service account if its ``web_identity_token_file`` is ``DIRECTORY/NAMESPACE/ACCOUNT``. No
other pod gets a volume that has any of it. The driver keeps no other tokens.
"""

import base64
import json
import os
import pwd
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from mountctl.extras.csi.csi_requests import Publication
from mountctl.extras.csi.status_errors import StatusError, invalid, precondition, shown

_UNFINISHED = ".new-"
"""How names of files begin that get a token: no service account's does."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
"""A namespace's name, or a service account's."""


class ServiceAccountTokens:
    """The *directory* with the tokens. Each is for the user of its mount's server, whom the mount's options name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        _make_directory(directory)
        for unfinished in directory.glob(f"*/{_UNFINISHED}*"):  # of a driver that was killed
            unfinished.unlink(missing_ok=True)

    def renew(self, wanted: Publication) -> bool:
        """Replace the token of a pod's service account, if one is kept; returns whether. Raises StatusError."""
        if wanted.namespace is None or wanted.service_account is None or wanted.tokens is None:
            return False
        file = self._directory / wanted.namespace / wanted.service_account
        try:
            owner = file.lstat().st_uid
        except OSError:
            return False
        self._keep(wanted, owner)
        return True

    def check(self, wanted: Publication, options: Mapping[str, Any]) -> None:
        """Keep a pod's token if the path belongs to its service account; *options* are the mount's.

        Raises StatusError: PERMISSION_DENIED if the path belongs to another, FAILED_PRECONDITION without a token.
        """
        owners = {
            owner
            for path, owner in self._owners(options)
            if f"{wanted.path}/".startswith(path) or path.startswith(f"{wanted.path}/" if wanted.path else "")
        }
        if not owners:
            return
        if owners != {(wanted.namespace, wanted.service_account)}:
            raise StatusError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"path {shown(wanted.path)} of the mount is for pods of another service account: "
                "see web_identity_token_file in the mount's configuration",
            )
        self._keep(wanted, _number(options.get("server_user", "root")))

    def _owners(self, options: Mapping[str, Any]) -> list[tuple[str, tuple[str, str]]]:
        """The paths of a mount that belong to service accounts, with a closing slash unless empty."""
        owners = []
        for table in ({**options, "path": ""}, *options.get("stores", ()), *options.get("tenants", ())):
            file = Path(table.get("web_identity_token_file", ""))
            if file.is_relative_to(self._directory):
                namespace, _, account = str(file.relative_to(self._directory)).partition("/")
                owners.append((f"{table['path']}/" if table["path"] else "", (namespace, account)))
        return owners

    def _keep(self, wanted: Publication, owner: int) -> None:
        """Write a pod's token for the user with this number; the file changes in one step. Raises StatusError."""
        namespace, account, token = _identity(wanted)
        directory = self._directory / namespace
        _make_directory(directory)
        number, new = tempfile.mkstemp(prefix=_UNFINISHED, dir=directory)
        try:
            with os.fdopen(number, "w") as file:
                file.write(token)
                os.fchown(number, owner, -1)
                os.fchmod(number, 0o400)
            os.rename(new, directory / account)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise


def _identity(wanted: Publication) -> tuple[str, str, str]:
    """A pod's namespace, its service account and the account's token. Raises StatusError."""
    namespace, account = wanted.namespace or "", wanted.service_account or ""
    for what, name in (("namespace", namespace), ("service account", account)):
        if not _NAME.fullmatch(name):
            raise invalid(f"{what} {shown(name)}: is not a Kubernetes name: set podInfoOnMount in the CSIDriver")
    try:
        (token,) = (each["token"] for each in json.loads(wanted.tokens or "{}").values())
        subject = _claims(token).get("sub")
    except (ValueError, TypeError, AttributeError, LookupError):
        raise precondition(
            f"path {shown(wanted.path)} belongs to a service account, and the request has not the one token of it: "
            "set one audience in tokenRequests of the CSIDriver"
        ) from None
    if subject != f"system:serviceaccount:{namespace}:{account}":
        raise StatusError(
            grpc.StatusCode.PERMISSION_DENIED, f"the token is not of service account {shown(account)} of the pod"
        )
    return namespace, account, token


def _number(user: str) -> int:
    """The number of a user, by name or number. Raises StatusError."""
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise precondition(f"server_user {shown(user)}: is not known to the driver: give its number") from None


def _claims(token: str) -> dict[str, Any]:
    """What a token says. Its signature is for STS to check; the kubelet is trusted. Raises ValueError, LookupError."""
    body = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return claims


def _make_directory(path: Path) -> None:
    """Make a directory that others may enter and not list, if there is none."""
    with suppress(FileExistsError):
        path.mkdir()
        path.chmod(0o711)
