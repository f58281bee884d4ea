"""STS for web identities, in front of moto's, which gives any token the role that it asks for.

As AWS's does, it checks a token's signature, audience and expiry, and that the role trusts its subject. The credentials
are moto's. A stand-in for the cluster's issuer makes the tokens.
"""

from __future__ import annotations

import contextlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs

import jwt
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.http_server import Server

from . import S3Server

AUDIENCE = "sts.amazonaws.com"
ISSUER = "https://kubernetes.default.svc"
_ERROR = (
    '<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>'
    "<Code>{}</Code><Message>{}</Message></Error><RequestId>1</RequestId></ErrorResponse>"
)


@dataclass(slots=True)
class WebIdentities:
    """A running STS. ``trust`` has the subject that may assume a role, by the role's name.

    Of each token that got credentials, ``accepted`` has its ``jti``. Credentials last ``lifetime_s``.
    """

    server: S3Server
    trust: Mapping[str, str]
    lifetime_s: float = 3600
    accepted: list[str] = field(default_factory=list)
    url: str = ""
    _key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def token(self, namespace: str, account: str, *, lifetime_s: float = 3600, audience: str = AUDIENCE) -> str:
        """A token of a service account, as the API server issues it for a pod."""
        now = time.time()
        claims = {
            "iss": ISSUER,
            "aud": [audience],
            "sub": f"system:serviceaccount:{namespace}:{account}",
            "exp": now + lifetime_s,
            "iat": now,
            "jti": f"{namespace}/{account}/{now}",
            "kubernetes.io": {"namespace": namespace, "serviceaccount": {"name": account}},
        }
        return jwt.encode(claims, self._key, algorithm="ES256")

    def refusal(self, asked: Mapping[str, list[str]]) -> tuple[str, str] | None:
        """The code and message of the error that a request gets; None if its token may assume the role."""
        try:
            claims: dict[str, Any] = jwt.decode(
                asked["WebIdentityToken"][0],
                self._key.public_key(),
                algorithms=["ES256"],
                audience=AUDIENCE,
                issuer=ISSUER,
            )
        except jwt.ExpiredSignatureError:
            return "ExpiredTokenException", "Token expired"
        except jwt.InvalidTokenError as error:
            return "InvalidIdentityToken", str(error)
        if self.trust.get(asked["RoleArn"][0].rpartition("/")[2]) != claims["sub"]:
            return "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity"
        self.accepted.append(claims["jti"])
        return None

    def answer(self, body: bytes) -> tuple[int, bytes]:
        """The answer to a request for credentials."""
        asked = parse_qs(body.decode())
        assert asked["Action"] == ["AssumeRoleWithWebIdentity"]
        refusal = self.refusal(asked)
        if refusal is not None:
            return 403 if refusal[0] == "AccessDenied" else 400, _ERROR.format(*refusal).encode()
        # As moto, unlike AWS, wants such a request signed.
        kind = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
        request = AWSRequest("POST", self.server.endpoint_url, kind, body)
        SigV4Auth(Credentials(self.server.access_key, self.server.secret_key), "sts", self.server.region).add_auth(
            request
        )
        address, headers = self.server.endpoint_url, dict(request.headers)
        signed = urllib.request.Request(address, data=body, headers=headers, method="POST")
        try:
            with urllib.request.urlopen(signed, timeout=10) as reply:
                content: bytes = reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        ends = datetime.now(UTC) + timedelta(seconds=self.lifetime_s)
        return 200, re.sub(rb"(?<=<Expiration>)[^<]*", ends.strftime("%Y-%m-%dT%H:%M:%SZ").encode(), content)


@contextlib.contextmanager
def start_sts(server: S3Server, trust: Mapping[str, str]) -> Iterator[WebIdentities]:
    """Run it in a thread until the context ends."""
    found = WebIdentities(server, trust)

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        status, content = found.answer(request.rfile.read(int(request.headers["Content-Length"])))
        return status, {"Content-Type": "text/xml"}, content

    with Server(answer).running() as sts:
        found.url = sts.url
        yield found
