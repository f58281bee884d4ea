"""The hub's refusals as trimsfs's own errors, each with its remedy."""

from collections.abc import Callable
from typing import TypeVar

from urllib3 import BaseHTTPResponse

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.huggingface.repositories import Repository
from trimsfs.stores.http.bodies import MalformedAnswerError
from trimsfs.stores.http.endpoints import UNANSWERED, unanswered

T = TypeVar("T")

_TEXT_LIMIT = 300
"""Most characters of a server's message to pass on."""


def translated(function: Callable[[], T], subject: str, key: str = "") -> T:
    """Call *function*, which makes a request. Raises StoreErrors of one line, which name the *key*."""
    try:
        return function()
    except (ObjectChangedError, ObjectNotFoundError) as error:
        raise type(error)(f"{key}: {error}" if key else str(error)) from error
    except UNANSWERED as error:
        raise unanswered(error, _one_line(error)) from error
    except MalformedAnswerError as error:
        said = f"the answer is not from a Hugging Face hub: check HF_ENDPOINT ({type(error.__cause__).__name__})"
        raise StoreUnavailableError(f"{subject}: {said}") from error


def refused(response: BaseHTTPResponse, repository: Repository | None, *, endpoint: str, has_token: bool) -> StoreError:
    """The error that an answer without success tells. Closes the answer."""
    status, code = response.status, response.headers.get("x-error-code", "")
    message = _one_line(response.headers.get("x-error-message") or f"HTTP status {status}")
    response.close()
    subject = str(repository) if repository is not None else endpoint
    if code == "GatedRepo":
        accept = f"accept its terms at {endpoint}/{repository.path}" if repository is not None else "accept its terms"
        token = "with the account of the token" if has_token else "and set HF_TOKEN, or run `hf auth login`"
        return StoreAccessError(f"{subject}: gated: {accept} {token}")
    if code == "RepoNotFound":
        remedy = "check the spelling" + ("" if has_token else ", or set HF_TOKEN if it is private")
        return BucketNotFoundError(f"{subject} does not exist: {remedy}")
    if code == "RevisionNotFound":
        return BucketNotFoundError(f"{subject}: this revision does not exist: {message}: check the spelling")
    if status in {401, 403}:
        remedy = "HF_TOKEN is not accepted: renew it" if has_token else "set HF_TOKEN, or run `hf auth login`"
        return StoreAccessError(f"{subject}: {message}: {remedy}")
    if status == 404:
        return ObjectNotFoundError(message)
    if status == 429:
        return StoreThrottledError(message)
    if status >= 500 or status == 408:
        return TransientStoreError(message)
    return StoreUnavailableError(f"{subject}: {message}")


def _one_line(text: object) -> str:
    """Foreign text as one line of bounded length, without the signature of an address."""
    words = (word.partition("?")[0] if "://" in word or word.startswith("/") else word for word in str(text).split())
    return " ".join(words)[:_TEXT_LIMIT]
