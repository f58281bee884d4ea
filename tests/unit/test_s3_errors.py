"""What refusals of S3 say: of which key, and what to do."""

import ssl
import time
from email.utils import formatdate
from typing import Any, NoReturn

import botocore.exceptions
import pytest

from trimsfs.errors import StoreAccessError, StoreNotTrustedError
from trimsfs.stores.s3.s3_errors import translated


def refusal(code: str, *, date: str | None = None, **more: str) -> str:
    headers = {} if date is None else {"date": date}
    answer: Any = {
        "Error": {"Code": code, "Message": "No.", **more},
        "ResponseMetadata": {"HTTPStatusCode": 403, "HTTPHeaders": headers},
    }

    def ask() -> NoReturn:
        raise botocore.exceptions.ClientError(answer, "ListObjectsV2")

    with pytest.raises(StoreAccessError) as caught:
        translated(ask, "b")
    return str(caught.value)


def test_a_wrong_secret_names_the_key() -> None:
    said = refusal("SignatureDoesNotMatch", AWSAccessKeyId="AKIA1")
    assert said == (
        "bucket b: ListObjectsV2: SignatureDoesNotMatch: No: of key AKIA1: "
        "check the secret: AWS_SECRET_ACCESS_KEY or the profile"
    )


@pytest.mark.parametrize(("off_s", "told"), [(-3600, "3600 s ahead"), (1800, "1800 s behind")])
def test_a_clock_that_is_off_is_told_by_how_much(monkeypatch: pytest.MonkeyPatch, off_s: int, told: str) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    said = refusal("RequestTimeTooSkewed", date=formatdate(1_700_000_000 + off_s, usegmt=True))
    assert f"the clock of this host is {told}: set it by NTP: " in said


@pytest.mark.parametrize("date", [None, "yesterday"])
def test_a_clock_is_named_also_if_the_answer_has_no_time(date: str | None) -> None:
    assert "the clock of this host and the store's differ: set it by NTP: " in refusal(
        "RequestTimeTooSkewed", date=date
    )


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("certificate is not yet valid", "set it by NTP: "),
        ("certificate has expired", "renew the certificate; if the clock is wrong, set it by NTP: "),
    ],
)
def test_a_certificate_of_another_time_is_told_by_the_clock(
    reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((1970, 1, 2, 3, 4, 5, 4, 2, 0)))
    said = f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {reason} (_ssl.c:1006)"

    def ask() -> NoReturn:
        raise botocore.exceptions.SSLError(endpoint_url="https://store:1/b", error=ssl.SSLError(1, said))

    with pytest.raises(StoreNotTrustedError) as caught:
        translated(ask, "b", ca_file="/ca.pem")
    told = f"the certificate of store: {reason}: the clock of this host says 1970-01-02 03:04 UTC: {remedy}"
    assert str(caught.value).startswith(told)
