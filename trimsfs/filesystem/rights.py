"""Rights: whether a tenant's own credentials may read an object, as the store says.

Bytes that are here were fetched once. Before a tenant opens a file, the store must have let its credentials read that
very content, at most the metadata's time to live ago. The question is a GET of one byte: unlike HEAD, it also needs the
right to a key that the object is encrypted with.
"""

from functools import partial

import trio
from cachetools import LRUCache

from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, StoreAccessError, StoreError, StoreUnavailableError
from trimsfs.namespace.derived import model_key
from trimsfs.namespace.inquiries import Inquiries
from trimsfs.options import Place, Tenant
from trimsfs.origins import ByPath
from trimsfs.stores.base import Store
from trimsfs.stores.retrying import Retrying
from trimsfs.types import Generation

MOST_GRANTS = 100_000
"""Most contents whose grant is remembered; each takes some 300 bytes."""


class Rights:
    """Asks a *store* about what tenants with credentials open, at their *places*.

    While the store does not answer, its last grant counts for *stale_for_s* seconds. A cache of a tenant's own has only
    what its credentials have fetched, and is read meanwhile.
    """

    def __init__(
        self,
        store: Store,
        retrying: ByPath[Retrying],
        places: ByPath[Place],
        *,
        ttl_s: float,
        stale_for_s: float,
    ) -> None:
        self._store = store
        self._retrying = retrying
        self._places = places
        self._inquiries = retrying.map(lambda each: Inquiries(store, store, each.breaker))
        self._ttl_s = ttl_s
        self._stale_for_s = stale_for_s
        self._granted = LRUCache[tuple[str, str], float](maxsize=MOST_GRANTS)

    def concern(self, generation: Generation) -> bool:
        """Whether the store decides who may open a content: a tenant with credentials reads it."""
        return self._tenant(generation) is not None and model_key(generation.key) is None

    def known(self, generation: Generation) -> bool:
        """Whether a content may be opened now, without a question to the store."""
        return not self.concern(generation) or self._age_s(generation) < self._ttl_s

    def may_tell(self, generation: Generation) -> bool:
        """Whether a user may learn what is cached of a content, without a question to the store.

        Of a cache that a tenant shares, it learns only of what it may open: others may have fetched it.
        """
        tenant = self._tenant(generation)
        return tenant is None or not tenant.share_cache or self.known(generation)

    async def check(self, generation: Generation) -> None:
        """Return if a content may be opened.

        Raises StoreAccessError, ObjectChangedError if the store has another one by now, and StoreUnavailableError.
        """
        if self.known(generation):
            return
        tenant = self._tenant(generation)
        apart = tenant is not None and not tenant.share_cache
        last = apart or self._age_s(generation) < self._stale_for_s
        asked, key, place = trio.current_time(), generation.key, (generation.key, generation.etag)
        attempt = partial(self._read, generation)
        try:
            if last:
                await self._inquiries.of(key).answer(key, attempt, patient=False)
            else:
                await self._retrying.of(key).call(key, attempt)
        except StoreAccessError:
            self._granted.pop(place, None)
            raise
        except ObjectNotFoundError as error:
            raise ObjectChangedError(f"{generation.key} has been deleted") from error
        except ObjectChangedError:
            raise
        except StoreError as error:
            if not last:
                raise StoreUnavailableError(str(error)) from error
        else:
            self._granted[place] = asked

    def _tenant(self, generation: Generation) -> Tenant | None:
        return self._places.of(generation.key).tenant if self._places.covers(generation.key) else None

    def _age_s(self, generation: Generation) -> float:
        """Seconds since the store granted a content; infinite if it has not."""
        granted = self._granted.get((generation.key, generation.etag), float("-inf"))
        return trio.current_time() - granted

    async def _read(self, generation: Generation) -> None:
        if generation.size:
            await self._store.read(generation, 0, 1, lambda _: None)  # only the right to read it matters
        else:
            await self._store.stat(generation.key)
