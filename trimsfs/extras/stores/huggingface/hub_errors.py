"""The hub's refusals as trimsfs's own errors, each with its remedy."""

from collections.abc import Callable
from typing import TypeVar

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.huggingface.repositories import Repository
from trimsfs.stores.http.failures import MalformedAnswerError, kind_of, translated, unsigned_line
from trimsfs.stores.http.http_client import Response

T = TypeVar("T")


def hub_errors(function: Callable[[], T], subject: str, key: str = "") -> T:
    """Call *function*, which makes a request. Raises StoreErrors of one line, which name the *key*."""

    def malformed(error: MalformedAnswerError) -> StoreError:
        said = f"the answer is not from a Hugging Face hub: check HF_ENDPOINT ({type(error.__cause__).__name__})"
        return StoreUnavailableError(f"{subject}: {said}")

    try:
        return translated(function, malformed)
    except (ObjectChangedError, ObjectNotFoundError) as error:
        raise type(error)(f"{key}: {error}" if key else str(error)) from error


def refused(response: Response, repository: Repository | None, *, endpoint: str, has_token: bool) -> StoreError:
    """The error that an answer without success tells. Closes the answer."""
    status, code = response.status, response.headers.get("x-error-code", "")
    message = unsigned_line(response.headers.get("x-error-message") or f"HTTP status {status}")
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
    kind = kind_of(status)
    told_alone = kind is ObjectNotFoundError or issubclass(kind, TransientStoreError)
    return kind(message if told_alone else f"{subject}: {message}")
