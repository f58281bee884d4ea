"""What refusals of S3 say: of which key, and what to do."""

import time
from email.utils import formatdate
from typing import Any, NoReturn

import botocore.exceptions
import pytest

from trimsfs.errors import StoreAccessError
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
