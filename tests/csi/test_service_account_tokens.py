"""Which paths of a mount belong to which service account, by the options that its server tells."""

import json
import os
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest

from mountctl.extras.csi.csi_requests import Publication
from mountctl.extras.csi.service_account_tokens import ServiceAccountTokens
from mountctl.extras.csi.status_errors import StatusError

TOKEN = jwt.encode({"sub": "system:serviceaccount:ns:reader"}, "k" * 32, algorithm="HS256")
OWN, OTHER, TOO_DEEP, ELSEWHERE = (
    "TOKENS/ns/reader",
    "TOKENS/other/reader",
    "TOKENS/ns/reader/x",
    "/run/other/ns/reader",
)


def wanted(path: str) -> Publication:
    return Publication(
        volume="v",
        target=Path("/pods/mount"),
        mount=None,
        path=path,
        namespace="ns",
        service_account="reader",
        tokens=json.dumps({"sts.amazonaws.com": {"token": TOKEN}}),
    )


def table(path: str, file: str) -> dict[str, Any]:
    return {"path": path, "web_identity_token_file": file}


@pytest.mark.parametrize(
    ("options", "path", "kept"),
    [
        ({}, "a", False),
        ({"tenants": [table("a", OWN)]}, "a", True),
        ({"tenants": [table("a", OWN)]}, "a/b", True),
        ({"tenants": [table("a/b", OWN)]}, "a", True),
        ({"tenants": [table("a", OWN)]}, "", True),
        ({"tenants": [table("a", OWN)]}, "ab", False),
        ({"tenants": [table("ab", OTHER)]}, "a", False),
        ({"tenants": [table("a", OWN), table("b", OTHER)]}, "a", True),
        ({"tenants": [table("a", OWN), table("b", OTHER)]}, "b", None),
        ({"tenants": [table("a", OWN), table("b", OTHER)]}, "", None),
        ({"tenants": [table("a", OWN), table("a/b", OTHER)]}, "a", None),
        ({"tenants": [table("a", OWN), table("a/b", OTHER)]}, "a/b", None),
        ({"tenants": [table("a", OWN), {"path": "b", "role_arn": "arn:aws:iam::1:role/r"}]}, "", True),
        ({"tenants": [table("a", TOO_DEEP)]}, "a", None),
        ({"tenants": [table("a", "TOKENS/ns")]}, "a", None),
        ({"tenants": [table("a", ELSEWHERE)]}, "a", False),
        ({"stores": [table("a", OTHER)]}, "a/b", None),
        ({"stores": [table("a", OTHER)]}, "b", False),
        ({"web_identity_token_file": OTHER}, "a", None),
        ({"web_identity_token_file": OTHER}, "", None),
        ({"web_identity_token_file": OWN}, "a", True),
    ],
)
def test_a_path_belongs_to_the_account_whose_token_reads_it(
    options: dict[str, Any], path: str, kept: bool | None, tmp_path: Path
) -> None:
    tokens = ServiceAccountTokens(tmp_path / "tokens")
    told = json.loads(json.dumps(options).replace("TOKENS", f"{tmp_path}/tokens")) | {"server_user": str(os.geteuid())}
    if kept is None:
        with pytest.raises(StatusError, match="another service account") as caught:
            tokens.check(wanted(path), told)
        assert caught.value.code == grpc.StatusCode.PERMISSION_DENIED
    else:
        tokens.check(wanted(path), told)
    found = [file for file in (tmp_path / "tokens").rglob("*") if file.is_file()]
    assert [file.read_text() for file in found] == ([TOKEN] if kept else [])


def test_a_user_that_the_driver_does_not_know_is_named(tmp_path: Path) -> None:
    tokens = ServiceAccountTokens(tmp_path / "tokens")
    with pytest.raises(StatusError, match="server_user 'nobody-knows': is not known to the driver: give its number"):
        tokens.check(
            wanted("a"), {"tenants": [table("a", f"{tmp_path}/tokens/ns/reader")], "server_user": "nobody-knows"}
        )


def test_a_publication_does_not_show_its_token() -> None:
    assert TOKEN not in repr(wanted("a"))
