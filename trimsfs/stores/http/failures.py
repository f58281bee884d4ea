"""Failures: what it means for a store that an answer does not come, is a refusal, or is not the service's."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import urllib3

from trimsfs.errors import (
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreNotTrustedError,
    StoreStalledError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)

T = TypeVar("T")

UNANSWERED = (urllib3.exceptions.HTTPError, OSError)
"""What urllib3 raises on a request without a whole answer."""
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
"""What parsers raise on an answer that is not the service's; ElementTree raises SyntaxErrors."""
_CONNECTION = re.compile(r"<[^<>]* object at 0x[0-9a-f]+>: |^HTTPS?Connection\([^)]*\): ")
"""How urllib3's texts begin that tell no more than an object of its own."""
_TEXT_LIMIT = 500
"""Most characters of foreign text to pass on."""
CLOCK_REMEDY = "set it by NTP: `timedatectl set-ntp true`, `chronyc makestep`"
_NOT_YET, _NO_LONGER = "certificate is not yet valid", "certificate has expired"
"""What OpenSSL says of a certificate of another time than now."""


class MalformedAnswerError(Exception):
    """An answer is not the service's. Its text is that of its cause, the error of the parser."""


@contextmanager
def parsing(*others: type[Exception]) -> Iterator[None]:
    """A block that only parses an answer, or has a library do that. Raises MalformedAnswerError.

    It stands for MALFORMED and *others*. Anywhere else, these are defects of trimsfs, and go up as they are.
    """
    malformed: tuple[type[Exception], ...] = (*MALFORMED, *others)
    try:
        yield
    except UNANSWERED:  # of these, some are ValueErrors, too
        raise
    except malformed as error:
        raise MalformedAnswerError(str(error)) from error


def translated(
    function: Callable[[], T],
    malformed: Callable[[MalformedAnswerError], StoreError],
    remedies: Mapping[str, str] | None = None,
) -> T:
    """Call *function*, which makes requests. Raises StoreErrors of one line, without signatures in addresses.

    *malformed* gives the error for an answer that is not the service's; *remedies*, what to do by what the text of
    another has in it.
    """
    try:
        return function()
    except UNANSWERED as error:
        said = unsigned_line(_CONNECTION.sub("", str(error)))
        if (by_clock := clock_remedy(said)) is not None:
            raise StoreNotTrustedError(f"{said}: {by_clock}") from error
        advice = [remedy for cause, remedy in (remedies or {}).items() if cause in said]
        raise unanswered(error, ": ".join((said, *advice))) from error
    except MalformedAnswerError as error:
        raise malformed(error) from error


def clock_remedy(said: str) -> str | None:
    """What to do about a certificate of another time than this host's, if a text tells of one."""
    clock = f"the clock of this host says {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
    if _NOT_YET in said:
        return f"{clock}: {CLOCK_REMEDY}"
    return f"{clock}: renew the certificate; if the clock is wrong, {CLOCK_REMEDY}" if _NO_LONGER in said else None


def unanswered(error: Exception, message: str) -> TransientStoreError:
    """The error for one of UNANSWERED, whose text is *message*."""
    late = isinstance(error, urllib3.exceptions.TimeoutError | TimeoutError)
    if late and not isinstance(error, urllib3.exceptions.NewConnectionError):  # to urllib3 a timeout, too
        return StoreStalledError(f"timeout: {message}")
    return TransientStoreError(message)


def kind_of(status: int) -> type[StoreError]:
    """The error that an HTTP status stands for, where the service gives it no other meaning."""
    if status in {401, 403}:
        return StoreAccessError
    if status == 404:
        return ObjectNotFoundError
    if status in {429, 503}:
        return StoreThrottledError
    if status in {408, 425} or status >= 500:
        return TransientStoreError
    return StoreUnavailableError


def one_line(text: object) -> str:
    """Foreign text as one line of bounded length, without a full stop: more follows."""
    return " ".join(str(text)[: 2 * _TEXT_LIMIT].split())[:_TEXT_LIMIT].rstrip(".")


def unsigned_line(text: object) -> str:
    """As `one_line`, of text that may have addresses: without their queries, which may be signatures."""
    words = str(text)[: 4 * _TEXT_LIMIT].split()
    return one_line(" ".join(word.partition("?")[0] if "://" in word or word[:1] == "/" else word for word in words))
