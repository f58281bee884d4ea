"""Whether a store answers and holds anything: what a mount asks it before it begins, with the remedies."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from trimsfs.errors import BucketNotFoundError, StoreNotTrustedError, StoreUnavailableError
from trimsfs.options import MountOptions, Place
from trimsfs.stores.base import Store
from trimsfs.stores.retrying import Retrying

log = logging.getLogger(__name__)


async def reach(store: Store, options: MountOptions, *, deadline_s: float) -> bool:
    """Check that a store answers and exists; a prefix exists if it holds an object. Returns whether there is any.

    Raises BucketNotFoundError, for an empty prefix only without ``options.allow_empty``, and the errors of `Store`.
    """
    retrying = Retrying(deadline_s=deadline_s, on_failure=None)
    await retrying.call("no answer", store.probe)
    page = await retrying.call("no answer", partial(store.list_page, "", limit=1))
    if not page.exists and not options.allow_empty:
        raise BucketNotFoundError(
            f"{options.store}: there is nothing under it: check the spelling (an alias is no prefix), or --allow-empty"
        )
    if not page.exists:
        log.warning("%s: there is nothing under it: check the spelling if you expect objects", options.store)
    return page.exists


def unreachable(error: StoreUnavailableError, options: MountOptions) -> str:
    """Why a store does not answer, with the remedy."""
    if isinstance(error.__cause__, StoreNotTrustedError):
        return str(error)
    if options.endpoint_url:
        return f"{error}: check the network and --endpoint-url: http or https, host, port"
    if (options.store or "").startswith("s3://"):
        return f"{error}: check the network; for a server of your own: --endpoint-url URL"
    return f"{error}: check the network"


async def reach_place(store: Store, place: Place, *, deadline_s: float) -> bool:
    """As `reach`, for one place of a mount. A tenant may have no object yet, and may list no more than its path."""
    if place.tenant is None:
        return await reach(store, place.options, deadline_s=deadline_s)
    await Retrying(deadline_s=deadline_s, on_failure=None).call("no answer", probe(store, place))
    return True


def probe(store: Store, place: Place) -> Callable[[], Awaitable[object]]:
    """A question that shows whether the store of a place answers."""
    if place.path == place.base:
        return store.probe
    return partial(store.list_page, place.path[len(place.base) :], limit=1)
