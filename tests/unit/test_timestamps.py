"""Timestamps are read as the SDK reads them."""

from datetime import UTC, datetime

import pytest
from botocore.utils import parse_timestamp
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.stores.s3.timestamps import parsed

MOMENTS = st.datetimes(min_value=datetime(1000, 1, 1), timezones=st.just(UTC))


@given(MOMENTS, st.integers(0, 6))
def test_times_in_listings(moment: datetime, digits: int) -> None:
    fraction = f".{moment.microsecond:06}"[: digits + 1] if digits else ""
    text = f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"
    assert parsed(text) == parse_timestamp(text)


@given(MOMENTS)
def test_times_in_headers(moment: datetime) -> None:
    text = f"{moment:%a, %d %b %Y %H:%M:%S} GMT"
    assert parsed(text) == parse_timestamp(text) == moment.replace(microsecond=0)


@pytest.mark.parametrize(
    "text",
    [
        *("2024-01-01T00:00:00+02:00", "2024-01-01T00:00:00", "20240101T000000Z", "2024-01-01 00:00:00Z", "1704067200"),
        *("2024-01-01T00:00:00.1234567Z", "Mon, 1 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 2024 00:00:00 +0100"),
        *("Monday, 01-Jan-24 00:00:00 GMT", "Mon Jan  1 00:00:00 2024", "1704067200.5"),
    ],
)
def test_times_of_other_forms(text: str) -> None:
    assert parsed(text) == parse_timestamp(text)


@pytest.mark.parametrize(
    "text", ["yesterday", "", "2024-02-30T00:00:00Z", "2024-01-01T25:00:00Z", "Mon, 31 Feb 2024 00:00:00 GMT"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_timestamp(text)
    with pytest.raises(ValueError, match=r"."):
        parsed(text)
