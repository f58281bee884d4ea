"""Signs models as ``model_signing sign key`` does."""

import base64
import hashlib
import json
from collections.abc import Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"


def new_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve or ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def statement(files: Mapping[str, bytes]) -> dict[str, object]:
    """What is signed of files by their paths."""
    digests = {name: hashlib.sha256(content) for name, content in sorted(files.items())}
    whole = hashlib.sha256(b"".join(digest.digest() for digest in digests.values()))
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": whole.hexdigest()}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "resources": [
                {"name": name, "algorithm": "sha256", "digest": digest.hexdigest()} for name, digest in digests.items()
            ],
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []},
        },
    }


def sign(
    key: ec.EllipticCurvePrivateKey,
    files: Mapping[str, bytes],
    *,
    payload: object = None,
    kind: str = PAYLOAD_TYPE,
) -> bytes:
    """The content of a signature file for files, or of any *payload*."""
    text = json.dumps(statement(files) if payload is None else payload).encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(text), text)
    by_size: dict[int, hashes.HashAlgorithm] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
    signature = key.sign(signed, ec.ECDSA(by_size[key.curve.key_size]))
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": ""}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(text).decode(),
            "payloadType": kind,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle).encode()
