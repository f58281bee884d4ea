"""Signed manifests: those of the key are read, all else is refused."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from tests.support.signing import new_key, pem, sign, statement
from trimsfs.errors import ConfigurationError, SignatureError
from trimsfs.extras.signatures.signed_manifest import load_key, read_manifest

KEY = new_key()
FILES = {"params": b"weights", "config.json": b"{}", "deep/er/shard-1": b""}
FROM_THE_TOOL = Path(__file__).with_name("signed")
"""A directory signed by ``model_signing sign key`` 1.1.1, and the public key."""


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_what_has_been_signed_is_read(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = new_key(curve)
    (tmp_path / "key.pem").write_bytes(pem(key))
    files = read_manifest(sign(key, FILES), load_key(tmp_path / "key.pem"))
    assert files.keys() == FILES.keys()
    assert str(files["config.json"]).startswith("sha256:44136fa355b3678a")
    assert files["params"].signed


def test_what_the_tool_has_signed_is_read() -> None:
    key = load_key(FROM_THE_TOOL / "key.pem")
    files = read_manifest((FROM_THE_TOOL / "model/model.sig").read_bytes(), key)
    assert files.keys() == {"config.json", "params"}
    with pytest.raises(SignatureError):
        read_manifest((FROM_THE_TOOL / "model/model.sig").read_bytes(), KEY.public_key())


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    bundle = json.loads(sign(KEY, FILES))
    change(bundle["dsseEnvelope"])
    return json.dumps(bundle).encode()


def other_payload() -> str:
    return base64.b64encode(json.dumps(statement({"params": b"others"})).encode()).decode()


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        (b"", "not a model signature"),
        (b"[" * 100_000, "not a model signature"),
        (b"[" + b"[]," * 1_000_000 + b"[]]", "not a model signature"),
        (b"\xff", "not a model signature"),
        (b"[]", "not a model signature"),
        (b'{"dsseEnvelope": {}}', "not a model signature"),
        (changed(lambda envelope: envelope.update(signatures=[])), "not a model signature"),
        (changed(lambda envelope: envelope.update(payload="?")), "not a model signature"),
        (changed(lambda envelope: envelope.update(payload=other_payload())), "not signed with the signing_key"),
        (changed(lambda envelope: envelope.update(payloadType="text/plain")), "not signed with the signing_key"),
        (changed(lambda envelope: envelope.update(payloadType="\ud800")), "not a model signature"),
        (changed(lambda envelope: envelope["signatures"][0].update(sig="AAAA")), "not signed with the signing_key"),
        (sign(new_key(), FILES), "not signed with the signing_key"),
        (sign(KEY, FILES, kind="text/plain"), "the signature is not of a model"),
        (sign(KEY, FILES, payload={}), "manifest has an unknown form"),
        (sign(KEY, FILES, payload=[]), "manifest has an unknown form"),
        (sign(KEY, FILES, payload=statement(FILES) | {"predicateType": "other"}), "predicate type is 'other'"),
        (sign(KEY, FILES, payload=statement(FILES) | {"subject": []}), "manifest contradicts itself"),
    ],
)
def test_what_is_no_signature_of_the_key_is_refused(bundle: bytes, message: str) -> None:
    with pytest.raises(SignatureError, match=message):
        read_manifest(bundle, KEY.public_key())


def test_digests_of_another_kind_are_told() -> None:
    payload: Any = statement(FILES)
    payload["predicate"]["serialization"]["method"] = "shards"
    with pytest.raises(SignatureError, match="digests are of shards by sha256: sign SHA-256 of files"):
        read_manifest(sign(KEY, FILES, payload=payload), KEY.public_key())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
)


@given(JSON)
def test_whatever_has_been_signed_breaks_nothing(payload: object) -> None:
    with pytest.raises(SignatureError):
        read_manifest(sign(KEY, {}, payload=payload if payload is not None else []), KEY.public_key())


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_a_file_holds_breaks_nothing(content: bytes) -> None:
    with pytest.raises(SignatureError):
        read_manifest(content, KEY.public_key())


def test_keys_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(ConfigurationError, match=r"option signing_key .*key.pem: No such file or directory"):
        load_key(path)
    path.write_text("no key")
    with pytest.raises(ConfigurationError, match="not a public key in PEM"):
        load_key(path)
    other = rsa.generate_private_key(65537, 2048).public_key()
    path.write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigurationError, match="must be an elliptic curve key"):
        load_key(path)
