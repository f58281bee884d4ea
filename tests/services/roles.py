"""A bucket of moto's whose objects users and roles may read as policies say: moto enforces IAM, and emulates STS.

Policies of S3 itself, of organisations and of sessions are not tried: moto lacks them.
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import boto3

from . import S3Server
from .moto import start_moto

ACCOUNT = "123456789012"


CLOSED = "closed"
"""A role that the operator may not assume."""


def arn_of(role: str) -> str:
    """The ARN of a role."""
    return f"arn:aws:iam::{ACCOUNT}:role/{role}"


def policy(bucket: str, patterns: Sequence[str], *, roles: Sequence[str] = ()) -> str:
    """A policy that allows to list a bucket, to read the keys that match, and to assume *roles*."""
    statements: list[dict[str, object]] = [
        {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{bucket}"}
    ]
    if patterns:
        resources = [f"arn:aws:s3:::{bucket}/{pattern}" for pattern in patterns]
        statements.append({"Effect": "Allow", "Action": "s3:GetObject", "Resource": resources})
    if roles:
        statements.append({"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": [*map(arn_of, roles)]})
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


TRUST = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}],
    }
)


@dataclass(frozen=True, slots=True)
class Authorising:
    """A server that checks signatures and policies. ``server`` has the keys of an operator, who may assume roles."""

    server: S3Server
    bucket: str
    iam: Any

    def role(self, name: str) -> str:
        """The ARN of a role."""
        return arn_of(name)

    def may_read(self, role: str, *patterns: str) -> None:
        """Let a role read the keys that match these patterns, and no others."""
        self.iam.put_role_policy(RoleName=role, PolicyName="read", PolicyDocument=policy(self.bucket, patterns))


@contextlib.contextmanager
def authorising(
    bucket: str, objects: Mapping[str, bytes], roles: Mapping[str, Sequence[str]], users: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Authorising, dict[str, S3Server]]]:
    """Serve a bucket until the context ends: *roles* and *users* may list it, and read the keys that match.

    Yields the server, and the same server with the keys of each user. The operator may read no object.
    """
    with start_moto() as server:
        iam: Any = boto3.client(
            "iam",
            endpoint_url=server.endpoint_url,
            region_name=server.region,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
        )
        with contextlib.closing(server.client()) as client:
            client.create_bucket(Bucket=bucket)
            for key, content in objects.items():
                client.put_object(Bucket=bucket, Key=key, Body=content)
        keys = {name: _user(iam, server, name, policy(bucket, patterns)) for name, patterns in users.items()}
        operator = _user(iam, server, "operator", policy(bucket, [], roles=[name for name in roles if name != CLOSED]))
        admin = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
        administrator = _user(iam, server, "administrator", json.dumps(admin))
        for name, patterns in roles.items():
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=TRUST)
            iam.put_role_policy(RoleName=name, PolicyName="read", PolicyDocument=policy(bucket, patterns))
        _enforce(server)
        own = boto3.client(
            "iam",
            endpoint_url=server.endpoint_url,
            region_name=server.region,
            aws_access_key_id=administrator.access_key,
            aws_secret_access_key=administrator.secret_key,
        )
        yield Authorising(operator, bucket, own), keys


def _user(iam: Any, server: S3Server, name: str, document: str) -> S3Server:
    """The server with the keys of a new user, who may do what a policy says."""
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="own", PolicyDocument=document)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return replace(server, access_key=key["AccessKeyId"], secret_key=key["SecretAccessKey"])


def _enforce(server: S3Server) -> None:
    """Have moto check all requests from now on: until then, everybody may do everything."""
    request = urllib.request.Request(
        f"{server.endpoint_url}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
