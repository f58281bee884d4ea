"""The options of commands that talk to a store themselves, without a mount."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import trio

from trimsfs.cli.mount_options import is_flag, metavar
from trimsfs.errors import StoreNotTrustedError, StoreUnavailableError, TransientStoreError, TrimsError
from trimsfs.extras.versions.catalog import Catalog
from trimsfs.extras.versions.location import Location
from trimsfs.options import MountOptions, flag, load_options
from trimsfs.stores.open import open_writer

T = TypeVar("T")

MOST_REQUESTS = 16
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
    options = reading(location, reach)

    async def act() -> T:
        writer = open_writer(options, scratch=location.scratch, max_requests=MOST_REQUESTS, conditions=conditions)
        try:
            return await action(Catalog(writer, location.name))
        finally:
            with trio.CancelScope(shield=True):
                await writer.aclose()

    return run(act)


def reading(location: Location, reach: dict[str, Any]) -> MountOptions:
    """The options that reach the store of a location. Raises ConfigurationError."""
    return load_options({**reach, "store": location.store})


def run(action: Callable[[], Awaitable[T]]) -> T:
    """Run an action. Raises the first TrimsError of concurrent tasks, or KeyboardInterrupt."""
    logging.getLogger("trimsfs").addHandler(logging.NullHandler())  # the error says it all
    try:
        return trio.run(action)
    except BaseExceptionGroup as group:
        raise _with_remedy(_first(group)) from None
    except StoreUnavailableError as error:
        raise _with_remedy(error) from None


def _with_remedy(error: BaseException) -> BaseException:
    """The error, with what to check if a store did not answer."""
    if isinstance(error, StoreUnavailableError) and isinstance(error.__cause__, TransientStoreError):
        trusted = not isinstance(error.__cause__, StoreNotTrustedError)
        return StoreUnavailableError(f"{error}: check the network and the address" if trusted else str(error))
    return error


def _first(error: BaseException) -> BaseException:
    """The first error of a group that was raised on purpose, else the first that was not."""
    leaves = [*_leaves(error)]
    return next((leaf for leaf in leaves if isinstance(leaf, TrimsError | KeyboardInterrupt)), leaves[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
