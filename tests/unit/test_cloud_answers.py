"""Answers of cloud services: what is parsed of right ones, and that wrong ones raise only what is expected."""

import base64
import json
from contextlib import suppress
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.extras.stores.cloud.azure import AzureBlobs
from trimsfs.extras.stores.cloud.azure_credentials import Account
from trimsfs.extras.stores.cloud.connections import Answer, Request
from trimsfs.extras.stores.cloud.gcs import GoogleStorage
from trimsfs.extras.stores.cloud.service import Service, content_name, digest_of, error_of, etag_of
from trimsfs.stores.http.failures import MALFORMED

SERVICES: list[Service] = [
    GoogleStorage("https://storage.googleapis.com", "bucket"),
    AzureBlobs(Account(name="a", endpoint="https://a.blob.core.windows.net"), "container"),
]
CRC, MD5 = base64.b64encode(b"1234").decode(), base64.b64encode(b"5" * 16).decode()


@pytest.mark.parametrize(
    ("told", "digest"),
    [
        ({"crc32c": CRC, "md5": MD5}, "crc32c:31323334"),
        ({"crc32c": None, "md5": MD5}, f"md5:{b'5'.hex() * 16}"),
        ({"crc32c": MD5, "md5": MD5}, f"md5:{b'5'.hex() * 16}"),  # of another length
        ({"md5": "not base64!"}, "None"),
        ({"md5": f"{MD5[:-2]};x"}, "None"),
        ({}, "None"),
    ],
)
def test_an_etag_carries_the_first_digest_that_is_one(told: dict[str, str | None], digest: str) -> None:
    etag = etag_of("0x8D", told)  # type: ignore[arg-type]
    assert content_name(etag) == "0x8D"
    assert str(digest_of(etag)) == digest


@pytest.mark.parametrize("etag", ["", ";", "x;", "x;md5=", "x;sha1=AAAA", f"x;md5={MD5};", f'"{MD5}"'])
def test_an_etag_of_another_form_has_no_digest(etag: str) -> None:
    assert digest_of(etag) is None


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.product)
@given(body=st.binary(max_size=200))
def test_no_body_raises_anything_else(service: Service, body: bytes) -> None:
    answer = Answer(200, {}, body)
    with suppress(*MALFORMED):
        service.listed(answer, "")
    with suppress(*MALFORMED):
        service.generation(answer, "key")
    assert "\n" not in str(error_of(service, Answer(500, {}, body), "key"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["items", "prefixes", "name", "size", "generation", "timeCreated", "nextPageToken", "error"]
            ),
            inner,
        )
    ),
)


@given(value=json_values)
def test_no_json_raises_anything_else(value: object) -> None:
    answer = Answer(200, {}, json.dumps(value).encode())
    with suppress(*MALFORMED):
        for generation in SERVICES[0].listed(answer, "").objects:
            generation.key.encode()
    assert "\n" not in str(error_of(SERVICES[0], Answer(400, {}, answer.body), ""))


@pytest.mark.parametrize("body", [b'{"prefixes": ["\\ud800/"]}', b"[" * 200_000, b'{"items": [{"name": "a"}]}'])
def test_answers_that_only_a_hostile_server_gives_are_malformed(body: bytes) -> None:
    with pytest.raises(MALFORMED):
        SERVICES[0].listed(Answer(200, {}, body), "")


def test_names_that_xml_cannot_hold_come_encoded() -> None:
    prefix = b'<BlobPrefix><Name Encoded="true">a%EF%BF%BE/</Name></BlobPrefix>'
    body = b"<EnumerationResults><Blobs>" + prefix + b"</Blobs></EnumerationResults>"
    assert SERVICES[1].listed(Answer(200, {}, body), "").prefixes == ("a\ufffe/",)


@given(key=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1), prefix=st.text(max_size=5))
def test_each_key_is_quoted_so_that_it_comes_back(key: str, prefix: str) -> None:
    google, azure = (service.stat(key).path for service in SERVICES)
    assert unquote(google.removeprefix("/storage/v1/b/bucket/o/")) == key
    assert "/" not in google.removeprefix("/storage/v1/b/bucket/o/")
    assert unquote(azure.removeprefix("/container/")) == key
    assert not {" ", "?", "#"} & set(azure)
    assert Request(path="/x", query={"prefix": prefix}).target.isascii()
