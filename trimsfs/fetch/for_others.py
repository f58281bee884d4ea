"""Chunks that other hosts of a fleet wait for."""

from collections.abc import Callable

from trimsfs.fetch.flights import Flight, no_room
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.tiers.blob import Blob, ChunkState


async def fetch_for_others(scheduler: FlightScheduler, pump: Callable[[], None], blob: Blob, chunks: range) -> None:
    """Wait until chunks of a blob are readable from disk; *pump* starts flights. Raises StoreError and CacheFullError.

    The flights go on if the caller is cancelled: another host may ask next.
    """
    flights = list[Flight]()
    for chunk in chunks:
        if blob.states[chunk] != ChunkState.VERIFIED:
            flight, new = scheduler.demand_for_others(blob, chunk)
            blob.users += new
            flights.append(flight)
    pump()
    for flight in flights:
        await flight.done.wait()
        if flight.error is not None:
            raise flight.error.with_traceback(None)
    if not all(blob.states[chunk] == ChunkState.VERIFIED for chunk in chunks):
        raise no_room(blob)
