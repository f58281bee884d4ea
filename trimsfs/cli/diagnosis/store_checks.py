"""The check of a store, for ``trimsfs doctor``: whether it can be listed and read, and its certificate verified."""

import ssl
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from trimsfs.cli.diagnosis.checks import Advice, ProblemError, as_server, server_of
from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, StoreAccessError, StoreUnavailableError
from trimsfs.options import MountOptions, Place, default_store
from trimsfs.stores.base import Store
from trimsfs.stores.open import beneath, open_store
from trimsfs.stores.reach import reach_place, unreachable
from trimsfs.stores.retrying import Retrying

PROBE_DEADLINE_S = 5.0
DEEPEST = 8
"""How many directories are entered to find an object to read."""


def check_store(place: Place, mount: MountOptions) -> str:
    """Check the store of a place, with its own credentials."""
    options = place.options
    if options.store == str(default_store()) and not default_store().exists():
        return f"{options.store}: the first mount creates it"

    async def probe() -> str:
        store = open_store(options, max_requests=1)
        try:
            _check_ca_file(store, mount)
            await reach_place(store, place, deadline_s=PROBE_DEADLINE_S)
            return await _read_byte(store, place)
        finally:
            await store.aclose()

    try:
        return trio.run(probe)
    except StoreUnavailableError as error:
        raise ProblemError(unreachable(error, options)) from None


def _check_ca_file(store: Store, mount: MountOptions) -> None:
    """Check that the server may read the file of CAs: this user's rights may differ. Raises ProblemError."""
    bucket = beneath(store)
    file = getattr(bucket, "ca_file", None) if bucket.identity.startswith("https:") else None
    if file is not None and Path(file).exists() and as_server(mount, '[ -r "$one" ]', [Path(file)]):
        raise ProblemError(
            f"CA file {file}: {server_of(mount)} may not read it: let that user read the file and enter the "
            "directories above it, or name a copy elsewhere in AWS_CA_BUNDLE"
        )
    if file is not None and Path(file).is_file() and not _has_certificate(file):
        raise ProblemError(f"CA file {file}: has no certificate in PEM: name another in AWS_CA_BUNDLE or ca_bundle")


def _has_certificate(file: str) -> bool:
    with suppress(OSError):  # ssl.SSLError is one; the request reports a file that nobody can read
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cafile=file)
        return True
    return False


async def _read_byte(store: Store, place: Place) -> str:
    """Read a byte of an object, as a key that lists may not read. Raises ProblemError, Advice and StoreError."""
    url, retrying = place.options.store, Retrying(deadline_s=PROBE_DEADLINE_S, on_failure=None)
    prefix = place.path[len(place.base) :]
    for depth in range(DEEPEST):
        page = await retrying.call("no answer", partial(store.list_page, prefix))
        if not depth and not len(page):
            raise Advice(
                f"{url} can be listed, but there is nothing under it: check the spelling if you expect objects"
            )
        generation = next((each for each in page.objects if each.size and each.plausible), None)
        if generation is not None:
            try:
                await retrying.call(generation.key, partial(store.read, generation, 0, 1, lambda _piece: None))
            except StoreAccessError as error:
                raise ProblemError(
                    f"{url} can be listed, but not read: {error}: allow s3:GetObject, or what the store calls it"
                ) from None
            except (ObjectChangedError, ObjectNotFoundError):
                break
            return f"{url} can be listed and read"
        if not page.prefixes:
            break
        prefix = page.prefixes[0]
    return f"{url} can be listed; no object was found to read a byte of"
