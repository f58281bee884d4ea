"""Scrubbing: reads blobs on the disk again from time to time, to find damage there."""

import logging
import time
from collections.abc import Callable

import trio

from trimsfs.errors import TrimsError
from trimsfs.integrity.chunk_checks import Repair
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.damage import Damage
from trimsfs.tiers.disk.interfaces import Inspection
from trimsfs.types import Generation

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 30.0
"""How often the scrubber looks for a blob that is due."""


class Scrubber:
    """Checks each blob on the disk once per *interval_s*, at *rate* bytes a second; then calls *checked*."""

    def __init__(
        self,
        blobs: Inspection,
        damage: Damage,
        repair: Repair,
        *,
        interval_s: float,
        rate: int,
        checked: Callable[[Blob], None],
    ) -> None:
        self._blobs = blobs
        self._damage = damage
        self._repair = repair
        self._interval_s = interval_s
        self._rate = rate
        self._checked = checked

    async def run(self) -> None:
        """Scrub until the server stops; do nothing if the interval is 0."""
        while self._interval_s:
            generation = await self._damage.next_to_scrub(time.time() - self._interval_s)
            if generation is None or not await self.scrub(generation):
                await trio.sleep(min(LOOK_INTERVAL_S, self._interval_s))

    async def scrub(self, generation: Generation) -> bool:
        """Check a generation's blob on the disk and record the scrub; False if it failed or could not be recorded."""
        try:
            async with self._blobs.inspecting_cached(generation) as blob:
                if blob is None or not blob.attached:
                    return False
                try:
                    finished = await self._repair.check(blob, rate=self._rate)
                finally:
                    self._checked(blob)
                return not finished or await self._damage.record_scrub(blob)
        except TrimsError as error:
            log.warning("%s: scrub failed: %s", generation.key, error)
            return False
