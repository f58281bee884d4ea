"""Timestamps in S3's answers, in the two forms that S3 writes. The SDK's own parser is slower: it guesses the form."""

import re
from datetime import datetime
from email.utils import parsedate_to_datetime

from botocore.utils import parse_timestamp

_IN_LISTING = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z")
_IN_HEADER = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


def parsed(text: str) -> datetime:
    """The time of a timestamp in any form. Raises ValueError and RuntimeError as the SDK's parser does."""
    if _IN_LISTING.fullmatch(text):
        return datetime.fromisoformat(text)
    return parsedate_to_datetime(text) if _IN_HEADER.fullmatch(text) else parse_timestamp(text)
