"""Signed manifests of models, in the format of OpenSSF Model Signing (``model_signing sign key``).

A manifest is the file ``model.sig`` of a model's directory: the digests of the files below it, signed with a key.
This is the only user of the cryptography package.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from trimsfs.errors import ConfigurationError, SignatureError
from trimsfs.stores.digests import Digest

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
MOST_PARTS = 1000
"""Most JSON values in an envelope: a real one has few, and parsing a forged one must not cost time."""
_NONE = "not a model signature: sign the model again"
_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_HASHES: dict[int, hashes.HashAlgorithm] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}


def load_key(path: Path) -> EllipticCurvePublicKey:
    """The public key in a PEM file. Raises ConfigurationError."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"option signing_key {path}: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(
            f"option signing_key {path}: not a public key in PEM: write it by `openssl ec -pubout`"
        ) from None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.key_size not in _HASHES:
        raise ConfigurationError(f"option signing_key {path}: must be an elliptic curve key of 256, 384 or 521 bits")
    return key


def load_private_key(path: Path) -> EllipticCurvePrivateKey:
    """The private key in a PEM file, without a passphrase. Raises ConfigurationError."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigurationError(f"option --sign {path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigurationError(f"option --sign {path}: not a private key in PEM without a passphrase") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.key_size not in _HASHES:
        raise ConfigurationError(f"option --sign {path}: must be an elliptic curve key of 256, 384 or 521 bits")
    return key


def sign(key: EllipticCurvePrivateKey, model: str, digests: Mapping[str, str]) -> bytes:
    """The content of a signature file: *digests* are SHA-256 in hexadecimal digits, by paths below its directory.

    The same each time, so that a push that is repeated signs what is in the store already.
    """
    names = sorted(digests)
    whole = hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in names)).hexdigest()
    statement = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": model, "digest": {"sha256": whole}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "resources": [{"name": name, "algorithm": "sha256", "digest": digests[name]} for name in names],
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []},
        },
    }
    payload = json.dumps(statement).encode()
    algorithm = ECDSA(_HASHES[key.curve.key_size], deterministic_signing=True)
    try:
        signature = key.sign(_signed_bytes(_PAYLOAD_TYPE, payload), algorithm)
    except UnsupportedAlgorithm:
        raise ConfigurationError("option --sign: needs OpenSSL 3.2 or newer, as in the package cryptography") from None
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": _PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    verification = {"publicKey": {"hint": ""}, "tlogEntries": []}
    bundle = {"mediaType": _BUNDLE_TYPE, "verificationMaterial": verification, "dsseEnvelope": envelope}
    return json.dumps(bundle).encode()


def reader(signing_key: Path) -> Callable[[bytes], Mapping[str, Digest]]:
    """A function as `read_manifest` that knows the public key in a file. Raises ConfigurationError."""
    return partial(read_manifest, key=load_key(signing_key))


def read_manifest(bundle: bytes, key: EllipticCurvePublicKey) -> Mapping[str, Digest]:
    """Verify a signature file; the digests of files, by their paths below its directory. Raises SignatureError."""
    if sum(map(bundle.count, (b"[", b"{", b","))) > MOST_PARTS:
        raise SignatureError(_NONE)
    try:
        envelope = json.loads(bundle)["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind = str(envelope["payloadType"])
        (signature,) = envelope["signatures"]
        signature_bytes = base64.b64decode(signature["sig"], validate=True)
        signed = _signed_bytes(kind, payload)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise SignatureError(_NONE) from None
    try:
        key.verify(signature_bytes, signed, ECDSA(_HASHES[key.curve.key_size]))
    except InvalidSignature:
        raise SignatureError("not signed with the signing_key: check who signed it") from None
    if kind != _PAYLOAD_TYPE:
        raise SignatureError("the signature is not of a model")
    return _manifest(payload)


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    """The bytes that an envelope's signature covers: see the DSSE protocol."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def _manifest(payload: bytes) -> Mapping[str, Digest]:
    """The digests in a verified payload. Raises SignatureError when its form is unknown."""
    try:
        statement: Any = json.loads(payload)
        if statement["predicateType"] != _PREDICATE_TYPE:
            raise SignatureError(f"predicate type is {statement['predicateType']!r}, not {_PREDICATE_TYPE!r}")
        predicate = statement["predicate"]
        method = predicate["serialization"]["method"]
        algorithms = {resource["algorithm"] for resource in predicate["resources"]}
        if method != "files" or not algorithms <= {"sha256"}:
            raise SignatureError(f"digests are of {method} by {', '.join(sorted(algorithms))}: sign SHA-256 of files")
        values = {resource["name"]: bytes.fromhex(resource["digest"]) for resource in predicate["resources"]}
        whole = hashlib.sha256(b"".join(values.values())).hexdigest()
        if [subject["digest"]["sha256"] for subject in statement["subject"]] != [whole]:
            raise SignatureError("the manifest contradicts itself: sign the model again")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SignatureError("the manifest has an unknown form: sign the model again") from None
    return {name: Digest(algorithm="sha256", value=value, signed=True) for name, value in values.items()}
