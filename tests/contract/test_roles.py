"""S3 with the credentials of a role. STS is moto's, which accepts any token."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.session import Session

from tests.contract.backends import MAX_REQUESTS, S3Backend, new_bucket, read, s3_options, use_only
from tests.services import S3Server
from trimsfs.errors import StoreAccessError
from trimsfs.options import MountOptions
from trimsfs.stores.open import open_store
from trimsfs.stores.s3 import S3Store
from trimsfs.stores.s3.sdk_data import use_less

ROLE = "arn:aws:iam::123456789012:role/reader"
TEMPORARY = "ASIA"
"""How access keys begin that STS gives."""


@pytest.fixture
def bucket(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Backend]:
    use_only(moto, monkeypatch)
    with contextlib.closing(moto.client()) as client:
        backend = new_bucket(client)
        backend.put("key", b"content")
        yield backend


def opened(bucket: S3Backend, **options: object) -> S3Store:
    plain = s3_options(bucket.client.meta.endpoint_url, bucket.bucket).model_dump(exclude_none=True)
    store = open_store(MountOptions.model_validate(plain | {"role_arn": ROLE} | options), max_requests=MAX_REQUESTS)
    assert isinstance(store, S3Store)
    return store


@pytest.mark.parametrize("by_token", [False, True], ids=["by other credentials", "by a web identity token alone"])
async def test_requests_have_the_credentials_of_the_role(
    bucket: S3Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_token: bool
) -> None:
    token = tmp_path / "token"
    token.write_text("eyJhbGciOiJub25lIn0.e30.\n")
    if by_token:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    store = opened(bucket, **({"web_identity_token_file": token} if by_token else {}))

    assert await read(store, await store.stat("key")) == b"content"
    credentials = store._client._request_signer._credentials  # type: ignore[attr-defined]
    assert credentials.get_frozen_credentials().access_key.startswith(TEMPORARY)
    await store.aclose()


async def test_a_token_that_cannot_be_read_is_named(bucket: S3Backend, tmp_path: Path) -> None:
    """It may be there later: the store is asked again with each request."""
    token = tmp_path / "token"
    store = opened(bucket, web_identity_token_file=token)

    with pytest.raises(StoreAccessError, match=f"token file {token}: No such file or directory: put the token there"):
        await store.stat("key")

    token.write_text("eyJhbGciOiJub25lIn0.e30.")
    assert (await store.stat("key")).size == len(b"content")
    await store.aclose()


def test_stores_of_one_process_share_what_the_sdk_knows() -> None:
    """Each tenant with credentials has a session of its own, which would take 2 MiB more."""
    loaders = []
    for _ in range(2):
        session = Session()
        use_less(session)
        loaders.append(session.get_component("data_loader"))

    one, other = loaders
    for service, kind in (("s3", "service-2"), ("s3", "endpoint-rule-set-1"), ("sts", "service-2")):
        assert one.load_service_model(service, kind) is other.load_service_model(service, kind)
    assert one.load_data("partitions") is other.load_data("partitions")
