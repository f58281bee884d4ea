"""Buckets whose objects users and roles may read as policies say: Ceph's STS and policies, and moto's emulation.

What Ceph has as policies of a bucket, for users, moto has as policies of the users.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import boto3

from . import S3Server, put
from .ceph import Ceph
from .moto import start_moto

CLOSED = "closed"
"""A role that the operator may not assume."""
OPERATOR = "operator"

Patterns = Mapping[str, Sequence[str]]
"""Patterns of the keys that may be read, by the name of a role or user."""


@dataclass(frozen=True, slots=True)
class Authorising:
    """A server that checks signatures and policies. ``server`` has the keys of an operator, who may list the bucket,
    read no object, and assume roles; ``users`` those of users. *set_policy* puts the policy of a role, in JSON."""

    server: S3Server
    bucket: str
    users: Mapping[str, S3Server]
    arn: Callable[[str], str]
    set_policy: Callable[[str, str], object]

    def may_read(self, role: str, *patterns: str) -> None:
        """Let a role list the bucket and read the keys that match these patterns, and no others."""
        self.set_policy(role, document(*reading(self.bucket, patterns)))


def document(*statements: dict[str, Any]) -> str:
    """A policy."""
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **each} for each in statements]})


def reading(bucket: str, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """The statements that allow to list a bucket, and to read the keys that match."""
    found: list[dict[str, Any]] = [{"Action": ["s3:ListBucket"], "Resource": f"arn:aws:s3:::{bucket}"}]
    if patterns:
        resources = [f"arn:aws:s3:::{bucket}/{pattern}" for pattern in patterns]
        found.append({"Action": ["s3:GetObject"], "Resource": resources})
    return found


def trust(principal: str) -> str:
    """The policy of who may assume a role."""
    return document({"Principal": {"AWS": principal}, "Action": "sts:AssumeRole"})


def of_ceph(ceph: Ceph, bucket: str, objects: Mapping[str, bytes], roles: Patterns, users: Patterns) -> Authorising:
    """A bucket of Ceph's, with users and roles of its own."""
    tag = secrets.token_hex(3)
    with contextlib.closing(ceph.client()) as client:
        client.create_bucket(Bucket=bucket)
        put(ceph, bucket, objects)
        servers = {name: _ceph_user(ceph, f"{name}-{tag}") for name in (*users, OPERATOR)}
        statements = [
            {"Principal": {"AWS": [f"arn:aws:iam:::user/{name}-{tag}"]}, **statement}
            for name in servers
            for statement in reading(bucket, users.get(name, ()))
        ]
        client.put_bucket_policy(Bucket=bucket, Policy=document(*statements))

    def set_policy(role: str, policy: str) -> None:
        ceph.administer(
            *("role-policy", "put", f"--role-name={role}-{tag}", "--policy-name=read", f"--policy-doc={policy}")
        )

    found = Authorising(servers[OPERATOR], bucket, servers, lambda name: f"arn:aws:iam:::role/{name}-{tag}", set_policy)
    for name, patterns in roles.items():
        principal = f"arn:aws:iam:::user/{'nobody' if name == CLOSED else OPERATOR}-{tag}"
        ceph.administer(
            *("role", "create", f"--role-name={name}-{tag}", "--path=/"), f"--assume-role-policy-doc={trust(principal)}"
        )
        found.may_read(name, *patterns)
    return found


def _ceph_user(ceph: Ceph, name: str) -> S3Server:
    """The server with the keys of a new user."""
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    keys = (f"--access-key={access_key}", f"--secret-key={secret_key}")
    ceph.administer("user", "create", f"--uid={name}", f"--display-name={name}", *keys)
    return S3Server(ceph.endpoint_url, access_key, secret_key, ceph.region)


@contextlib.contextmanager
def of_moto(bucket: str, objects: Mapping[str, bytes], roles: Patterns, users: Patterns) -> Iterator[Authorising]:
    """A bucket of a moto of its own, until the context ends."""
    with start_moto() as server:
        account = "arn:aws:iam::123456789012"
        iam = _iam(server)
        with contextlib.closing(server.client()) as client:
            client.create_bucket(Bucket=bucket)
        put(server, bucket, objects)
        servers = {
            name: _moto_user(iam, server, name, document(*reading(bucket, patterns)))
            for name, patterns in users.items()
        }
        assuming = {
            "Action": "sts:AssumeRole",
            "Resource": [f"{account}:role/{name}" for name in roles if name != CLOSED],
        }
        by_token = {"Action": "sts:AssumeRoleWithWebIdentity", "Resource": "*"}  # STS asks as the operator
        operator = _moto_user(iam, server, OPERATOR, document(*reading(bucket, ()), assuming, by_token))
        administrator = _moto_user(iam, server, "administrator", document({"Action": "*", "Resource": "*"}))
        for name in roles:
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust("*"))
        _enforce(server)
        iam = _iam(administrator)

        def set_policy(role: str, policy: str) -> None:
            iam.put_role_policy(RoleName=role, PolicyName="read", PolicyDocument=policy)

        found = Authorising(operator, bucket, servers, lambda name: f"{account}:role/{name}", set_policy)
        for name, patterns in roles.items():
            found.may_read(name, *patterns)
        yield found


def _iam(server: S3Server) -> Any:
    return boto3.client(
        "iam",
        endpoint_url=server.endpoint_url,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )


def _moto_user(iam: Any, server: S3Server, name: str, policy: str) -> S3Server:
    """The server with the keys of a new user, who may do what a policy says."""
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="own", PolicyDocument=policy)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return replace(server, access_key=key["AccessKeyId"], secret_key=key["SecretAccessKey"])


def _enforce(server: S3Server) -> None:
    """Have moto check all requests from now on: until then, everybody may do everything."""
    request = urllib.request.Request(
        f"{server.endpoint_url}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
