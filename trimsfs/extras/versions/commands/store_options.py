"""The options of commands that talk to a store themselves, without a mount."""

import logging
import os
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import trio

from trimsfs.cli.mount_options import is_flag, metavar
from trimsfs.errors import (
    BucketNotFoundError,
    StoreAccessError,
    StoreNotTrustedError,
    StoreUnavailableError,
    TransientStoreError,
    TrimsError,
)
from trimsfs.extras.versions.catalog import Catalog
from trimsfs.extras.versions.location import Location
from trimsfs.mountinfo import mount_of
from trimsfs.namespace.lifetimes import NEGATIVE_TTL_S
from trimsfs.options import MountOptions, flag, load_options
from trimsfs.stores.open import directory_of, open_writer

T = TypeVar("T")

MOST_REQUESTS = 16
SEEN = (
    f"mounts see it within {NEGATIVE_TTL_S:.0f} s, in `ls` within "
    f"{MountOptions.model_fields['metadata_ttl'].default:.0f} s; at once: `trimsfs refresh PATH`"
)
"""When readers see what is new, by the defaults of a mount."""
_NAMES = (
    *("endpoint_url", "region", "profile", "addressing_style"),
    *("requester_pays", "sse_c_key_file", "transfer_acceleration"),
)


def store_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with the options that say how to reach a store: it receives them as ``reach``."""

    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in _NAMES}
        command(reach={name: value for name, value in given.items() if value is not None}, **arguments)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    decorated: Callable[..., None] = wrapped
    for name in reversed(_NAMES):
        text = MountOptions.model_fields[name].description
        kind: dict[str, Any] = {"is_flag": True} if is_flag(name) else {"metavar": metavar(name)}
        decorated = click.option(flag(name), name, default=None, help=text, **kind)(decorated)
    return decorated


single_writer = click.option(
    "--single-writer",
    is_flag=True,
    help="Use a store that ignores conditions. Nobody else may publish this model meanwhile.",
)


def run_on_catalog(
    action: Callable[[Catalog], Awaitable[T]], location: Location, reach: dict[str, Any], *, conditions: bool = True
) -> T:
    """The result of an action on a model's versions. Raises TrimsError."""
    _check_no_mount(location)
    options = reading(location, reach)

    async def act() -> T:
        writer = open_writer(options, scratch=location.scratch, max_requests=MOST_REQUESTS, conditions=conditions)
        try:
            return await action(Catalog(writer, location.name, aws=_aws(options)))
        finally:
            with trio.CancelScope(shield=True):
                await writer.aclose()

    return _run(act, location, options)


def _check_no_mount(location: Location) -> None:
    """Raises StoreAccessError for a location on a mount of trimsfs, which hides what describes versions."""
    root = directory_of(location.store)
    if root is None:
        return
    for resolved in (os.path.abspath, os.path.realpath):  # the first touches no mount, which may hang
        mounted = mount_of(Path(resolved(root)))
        if mounted is not None:
            raise StoreAccessError(
                f"{location}: {mounted.mountpoint} is a mount of trimsfs, which never takes writes: "
                f"name its store, {mounted.source}"
            )


def _aws(options: MountOptions) -> str:
    """How the AWS command line reaches a store with the same options."""
    given = {"--endpoint-url": options.endpoint_url, "--region": options.region, "--profile": options.profile}
    return shlex.join(["aws", *(word for name, value in given.items() if value for word in (name, value))])


def reading(location: Location, reach: dict[str, Any]) -> MountOptions:
    """The options that reach the store of a location. Raises ConfigurationError."""
    return load_options({**reach, "store": location.store})


def _run(action: Callable[[], Awaitable[T]], location: Location, options: MountOptions) -> T:
    """Run an action on a store. Raises the first TrimsError of concurrent tasks, or KeyboardInterrupt."""
    logging.getLogger("trimsfs").addHandler(logging.NullHandler())  # the error says it all
    try:
        return trio.run(action)
    except BaseExceptionGroup as group:
        raise _with_remedy(_first(group), location, options) from None
    except (BucketNotFoundError, StoreAccessError, StoreUnavailableError) as error:
        raise _with_remedy(error, location, options) from None


def _with_remedy(error: BaseException, location: Location, options: MountOptions) -> BaseException:
    """The error, with what to check if a store did not answer, or may be another one than meant."""
    cause = error.__cause__
    may_be_elsewhere = location.store.startswith("s3://") and options.endpoint_url is None  # then it is AWS
    own = f"for a server of your own: `{location} --endpoint-url URL`" if may_be_elsewhere else ""
    if isinstance(error, StoreUnavailableError) and isinstance(cause, TransientStoreError):
        if isinstance(cause, StoreNotTrustedError):
            return error
        if getattr(cause.__cause__, "response", None) is not None:  # the store's answer, as the SDK has it
            return StoreUnavailableError(f"{error}: the store answers with this error: try again, or see its log")
        return StoreUnavailableError(f"{error}: check the network{f'; {own}' if own else ' and the address'}")
    if own and (isinstance(error, BucketNotFoundError) or "InvalidAccessKeyId" in str(error)):
        return type(error)(f"{error}; {own}")
    return error


def _first(error: BaseException) -> BaseException:
    """The first error of a group that was raised on purpose, else the first that was not."""
    leaves = [*_leaves(error)]
    return next((leaf for leaf in leaves if isinstance(leaf, TrimsError | KeyboardInterrupt)), leaves[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
