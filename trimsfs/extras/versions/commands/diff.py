"""``trimsfs diff``: what differs between two versions of a model."""

import json
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio
from rich.filesize import decimal

from trimsfs.cli.output import reported, say, show
from trimsfs.command_group import examples
from trimsfs.extras.versions.catalog import Catalog
from trimsfs.extras.versions.commands.store_options import MOST_REQUESTS, reading, run_on_catalog, store_options
from trimsfs.extras.versions.content import StoredFile
from trimsfs.extras.versions.description import SAFETENSORS, tensor_print, tensors_of
from trimsfs.extras.versions.difference import Change, Changed, Difference, Version, compare
from trimsfs.extras.versions.location import Location, parse_version
from trimsfs.formats.fingerprints import Fingerprint
from trimsfs.stores.base import Store
from trimsfs.stores.open import directory_of, open_store
from trimsfs.stores.retrying import Retrying

_SIGNS: dict[Change, str] = {"equal": "=", "changed": "~", "added": "+", "removed": "-", "unknown": "?"}
_MOST_SHOWN = 20


@click.command(
    epilog=examples(
        "trimsfs diff s3://my-models/llama:v1 s3://my-models/llama:v2",
        "trimsfs diff --tensors s3://my-models/llama:prod s3://my-models/llama:v2",
    )
)
@click.argument("first", metavar="STORE/NAME:A")
@click.argument("second", metavar="STORE/NAME:B")
@click.option("--tensors", is_flag=True, help="Name all tensors that differ, not only the first 20.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@store_options
@reported
def diff(first: str, second: str, tensors: bool, as_json: bool, reach: dict[str, Any]) -> None:
    """Show how two versions differ, by file and by tensor. A and B may be aliases.

    Also how many bytes a host that has A fetches and stores for B; with --share-chunks, if both are of one model.

    trimsfs compares the fingerprints that a push has left. Where there are none, as after an interrupted import, it
    reads the headers of safetensors files. Then it compares names, types and shapes of tensors.
    """
    one, other = parse_version(first), parse_version(second)
    (a, before), (b, after) = (
        run_on_catalog(partial(_version, location=location, reach=reach), location, reach) for location in (one, other)
    )
    related = _model(one) == _model(other)
    same = related and a == b
    difference = compare(before, after)
    if as_json:
        document = {"first": a, "second": b, **asdict(difference)}
        document |= {} if related else {"missing_bytes": None, "shared_bytes": None}
        document |= {"fetched_bytes": 0} if same else {}
        click.echo(json.dumps(document, indent=2))
        return
    for location, version in ((one, a), (other, b)):
        if location.version != version:
            say(f"{location.version} leads to {version}")
    if same:
        say("the same version")
        return
    _show_files(difference)
    _show_tensors(difference, None if tensors else _MOST_SHOWN)
    _show_bytes(difference, related=related)


def _model(location: Location) -> tuple[Path | str, str]:
    """What tells models apart: mounts share chunks among the versions of one model only."""
    root = directory_of(location.store)
    return location.store if root is None else root.resolve(), location.name


async def _version(catalog: Catalog, location: Location, reach: dict[str, Any]) -> tuple[str, Version]:
    """The name of a version, also where the location has that of an alias, and what it consists of."""
    manifest = await catalog.published(await catalog.led_to(location.version or ""))
    fingerprints = dict(await catalog.fingerprints(manifest.version))
    missing = [path for path in manifest.files if path.endswith(SAFETENSORS) and path not in fingerprints]
    if missing:
        options = reading(location, reach)
        store = open_store(options, max_requests=MOST_REQUESTS)
        try:
            retrying = Retrying(deadline_s=options.retry_deadline, on_failure=None)
            await _read_headers(store, retrying, f"{location.name}/{manifest.version}/", missing, fingerprints)
        finally:
            await store.aclose()
    return manifest.version, Version(files=manifest.files, fingerprints=fingerprints)


async def _read_headers(
    store: Store, retrying: Retrying, prefix: str, paths: list[str], fingerprints: dict[str, Fingerprint]
) -> None:
    """Add to *fingerprints* what the headers of safetensors files tell."""

    async def one(path: str) -> None:
        generation = await retrying.call(f"{path}: not found", lambda: store.stat(prefix + path))
        tensors = await tensors_of(path, StoredFile(store, generation, retrying))
        prints = {tensor.name: tensor_print(tensor, None) for tensor in tensors}
        fingerprints[path] = Fingerprint(chunks=(), tensors=prints)

    async with trio.open_nursery() as nursery:
        for path in paths:
            nursery.start_soon(one, path)


def _show_files(difference: Difference) -> None:
    rows = [("", "FILE", "SIZE")]
    rows += [(_SIGNS[one.change], one.name, decimal(one.nbytes)) for one in difference.files if one.change != "equal"]
    if len(rows) > 1:
        show(rows, left=2)
    say(f"files: {_counts(difference.files)}")


def _show_tensors(difference: Difference, most: int | None) -> None:
    if not difference.tensors:
        return
    differing = [one for one in difference.tensors if one.change not in {"equal", "unknown"}]
    rows = [("", "TENSOR", "SIZE"), *((_SIGNS[one.change], one.name, decimal(one.nbytes)) for one in differing[:most])]
    if differing:
        show(rows, left=2)
    if most is not None and len(differing) > most:
        say(f"   and {len(differing) - most} more: see --tensors")
    say(f"tensors: {_counts(difference.tensors)}")


def _counts(changes: tuple[Changed, ...]) -> str:
    counts = Counter(one.change for one in changes)
    words = {"unknown": "of equal shape, but not compared"}
    return ", ".join(f"{counts[change]} {words.get(change, change)}" for change in _SIGNS if counts[change]) or "none"


def _show_bytes(difference: Difference, *, related: bool) -> None:
    fetched, shared = difference.fetched_bytes, difference.shared_bytes
    say(f"different: {decimal(difference.different_bytes)} of {decimal(fetched)}")
    if not related:
        say(f"a host that has A fetches {decimal(fetched)} for B, and stores as much: they are of two models")
        return
    stored = "an unknown part of that" if shared is None else decimal(fetched - shared)
    say(f"a host that has A fetches {decimal(fetched)} for B; with --share-chunks {decimal(difference.missing_bytes)}")
    say(f"in its cache, B takes {decimal(fetched)}; with --share-chunks {stored}")
