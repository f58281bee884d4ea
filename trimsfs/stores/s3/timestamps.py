"""Timestamps in S3's answers, in the two forms that S3 writes. The SDK's own parser is slower: it guesses the form."""

import re
from datetime import UTC, datetime

from botocore.utils import parse_timestamp

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_IN_LISTING = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z")
_IN_HEADER = re.compile(
    rf"[A-Z][a-z]{{2}}, ([0-9]{{2}}) ({'|'.join(_MONTHS)}) ([0-9]{{4}}) ([0-9]{{2}}):([0-9]{{2}}):([0-9]{{2}}) GMT"
)


def parsed(text: str) -> datetime:
    """The time of a timestamp in any form. Raises ValueError and RuntimeError as the SDK's parser does."""
    if _IN_LISTING.fullmatch(text):
        return datetime.fromisoformat(text)
    header = _IN_HEADER.fullmatch(text)
    if header is None:
        return parse_timestamp(text)
    day, month, year, *time = header.groups()
    hour, minute, second = map(int, time)
    return datetime(int(year), _MONTHS.index(month) + 1, int(day), hour, minute, second, tzinfo=UTC)
