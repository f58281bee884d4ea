"""``trimsfs push`` and ``import``: publish a version of a model."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from trimsfs.cli.gpu import counted
from trimsfs.cli.output import fail, reported, say
from trimsfs.command_group import complete_path, examples
from trimsfs.errors import ConfigurationError
from trimsfs.extras.versions.alignment import LocalSource, aligned
from trimsfs.extras.versions.catalog import Catalog
from trimsfs.extras.versions.commands.store_options import (
    MOST_REQUESTS,
    SEEN,
    run_on_catalog,
    single_writer,
    store_options,
)
from trimsfs.extras.versions.content import (
    Bytes,
    Content,
    LocalFile,
    check_hint,
    files_of_directory,
    files_of_store,
    total,
)
from trimsfs.extras.versions.description import SAFETENSORS, describe
from trimsfs.extras.versions.location import Location, parse_new
from trimsfs.extras.versions.publishing import Publication, content_id, publish
from trimsfs.extras.versions.removal import expire
from trimsfs.formats import safetensors
from trimsfs.formats.table import FormatError
from trimsfs.options import load_options
from trimsfs.stores.open import directory_of, open_store
from trimsfs.stores.retrying import Retrying
from trimsfs.text import printable

Signer = Callable[[str, Mapping[str, str]], bytes]
"""Makes a signed manifest of a model's name and the SHA-256s of its files by path."""

SIGNATURE = "model.sig"
_AUTOMATIC = 12
"""Hexadecimal digits of a version's name that is made of its content."""

_MOST_NAMED = 5
"""Most hidden names that a message has."""

_quiet = click.option("--quiet", is_flag=True, help="Show no progress bar and no success line.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(
    epilog=examples(
        "trimsfs push ./llama s3://my-models/llama:v2",
        "trimsfs push --align --sign key.pem ./llama s3://my-models/llama:v3",
        "trimsfs push ./llama /srv/models/llama",
    )
)
@click.argument("source", metavar="DIR", shell_complete=complete_path)
@click.argument("target", metavar="STORE/NAME[:VERSION]")
@click.option(
    "--align", is_flag=True, help="Lay out safetensors so that tensors of whole pages begin at multiples of 4 KiB."
)
@click.option(
    "--sign", "key", type=Path, metavar="KEY", help="Sign the files with this private key, in PEM: adds model.sig."
)
@single_writer
@_quiet
@_as_json
@store_options
@reported
def push(
    source: str,
    target: str,
    align: bool,
    key: Path | None,
    single_writer: bool,
    quiet: bool,
    as_json: bool,
    reach: dict[str, Any],
) -> None:
    """Publish the files of a directory as one version of a model.

    STORE is s3://BUCKET[/PREFIX] or a directory. Without VERSION, the version is named after its content.

    Readers see all files of the version at once, when the push ends. A version never changes. If a push is interrupted,
    the same command uploads what is missing. Hidden files are left out, but for .trims-prefetch.json.
    """
    _check_order(source, target)
    signed = _signer(key) if key is not None else None  # before anything is read: it may be missing
    directory, location = Path(source), parse_new(target)
    files, hidden = files_of_directory(directory)
    _check_apart(directory, location)
    if key is None and align and SIGNATURE in files:
        raise ConfigurationError(f"{directory / SIGNATURE}: --align changes what it signs: sign anew with --sign KEY")
    contents: dict[str, Content] = {path: _laid_out(file, align) for path, file in files.items()}
    if signed is not None:
        contents.pop(SIGNATURE, None)

    async def act(catalog: Catalog) -> tuple[Location, Publication]:
        return await _publish(catalog, location, contents, signed, conditions=not single_writer, bar=not quiet)

    with _repeatable():
        published = run_on_catalog(act, location, reach, conditions=not single_writer)
    _tell(*published, hidden, quiet=quiet, as_json=as_json)


@click.command(
    "import",
    epilog=examples(
        "trimsfs import hf://org/model s3://my-models/model",
        "trimsfs import hf://org/model@main s3://my-models/model:v1",
        "trimsfs import s3://other-bucket/model /srv/models/model:v1",
    ),
)
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="STORE/NAME[:VERSION]")
@click.option("--source-endpoint-url", metavar="URL", help="Address of the source's server, if it has another one.")
@click.option("--source-profile", metavar="TEXT", help="Profile of the AWS configuration files, for the source.")
@single_writer
@_quiet
@_as_json
@store_options
@reported
def import_(
    source: str,
    target: str,
    source_endpoint_url: str | None,
    source_profile: str | None,
    single_writer: bool,
    quiet: bool,
    as_json: bool,
    reach: dict[str, Any],
) -> None:
    """Publish the files of another store as one version of a model.

    SOURCE is a store that trimsfs can mount. The bytes pass through this host's memory; it keeps no copy.

    If the import is interrupted, the same command uploads what is missing. Hidden files are left out, but for
    .trims-prefetch.json.
    """
    location = parse_new(target)
    own = {"endpoint_url": source_endpoint_url, "profile": source_profile}
    options = load_options({"store": source} | {name: value for name, value in own.items() if value is not None})
    left_out = list[str]()

    async def act(catalog: Catalog) -> tuple[Location, Publication]:
        nonlocal left_out
        store = open_store(options, max_requests=MOST_REQUESTS)
        try:
            retrying = Retrying(deadline_s=options.retry_deadline, on_failure=None)
            files, left_out = await files_of_store(store, retrying, source)
            return await _publish(catalog, location, files, None, conditions=not single_writer, bar=not quiet)
        finally:
            await store.aclose()

    with _repeatable():
        published = run_on_catalog(act, location, reach, conditions=not single_writer)
    _tell(*published, left_out, quiet=quiet, as_json=as_json)


def _check_order(source: str, target: str) -> None:
    """Raises ConfigurationError when the arguments are swapped, or what is to be pushed is a store."""
    if os.path.exists(source):
        return
    if os.path.isdir(target):
        raise ConfigurationError(f"{source}: no such directory: DIR comes first: `trimsfs push {target} {source}`")
    if "://" in source:
        verb = "import" if "://" in target else "push"
        first, second = (source, target) if verb == "import" else (target, source)
        raise ConfigurationError(f"{source} is a store, not a directory: write `trimsfs {verb} {first} {second}`")


def _signer(key: Path) -> Signer:
    """What signs files with a private key. Raises ConfigurationError, also without the package for it."""
    try:
        from trimsfs.extras.signatures.signed_manifest import load_private_key, sign  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(f"option --sign: {error}: pip install 'trimsfs[signatures]'") from None
    private = load_private_key(key)
    return lambda name, digests: sign(private, name, digests)


@contextmanager
def _repeatable() -> Iterator[None]:
    """A block after whose interruption the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        fail(KeyboardInterrupt.__name__, "interrupted: the same command uploads what is missing")


def _check_apart(directory: Path, location: Location) -> None:
    """Raises ConfigurationError for a version that would lie in what is pushed: the next push would have it, too."""
    root = directory_of(location.store)
    if root is not None and (root / location.name).resolve().is_relative_to(directory.resolve()):
        raise ConfigurationError(f"{location}: it would lie in what is pushed, {directory}: name a store outside of it")


def _laid_out(file: LocalFile, align: bool) -> Content:
    """A file as it is pushed. Raises ConfigurationError for safetensors that are cut short or otherwise malformed."""
    if file.path.suffix != SAFETENSORS:
        return file
    try:
        if align:
            return aligned(file)
        safetensors.parse(LocalSource(file))
        return file
    except FormatError as error:
        raise ConfigurationError(f"{file.path}: not valid safetensors: {error}") from None


async def _publish(
    catalog: Catalog,
    location: Location,
    contents: Mapping[str, Content],
    signed: Signer | None,
    *,
    conditions: bool,
    bar: bool,
) -> tuple[Location, Publication]:
    """Publish contents, and what *signed* makes of their digests; where, and what was done."""
    await check_hint(contents)
    with _progress("reading", total(contents), bar) as progress:
        files = await describe(contents, progress)
    if signed is not None:
        digests = {path: file.sha256 for path, file in files.items()}
        files |= await describe({SIGNATURE: Bytes(signed(location.name, digests))})
    version = location.version or content_id(files)[:_AUTOMATIC]
    location = Location(store=location.store, name=location.name, version=version)
    await expire(catalog)
    with _progress(f"pushing {location}", total({path: file.content for path, file in files.items()}), bar) as progress:
        return location, await publish(catalog, version, files, conditions=conditions, progress=progress)


@contextmanager
def _progress(title: str, size: int, bar: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    shown = bar and console.is_terminal and sys.stdout.isatty()
    with Progress(*columns, console=console, disable=not shown) as progress:
        task = progress.add_task(printable(title), total=size)
        yield lambda count: progress.advance(task, count)


def _tell(location: Location, publication: Publication, hidden: Sequence[str], *, quiet: bool, as_json: bool) -> None:
    manifest = publication.manifest
    if as_json:
        document = {
            "version": manifest.version,
            "files": len(manifest.files),
            "bytes": manifest.size,
            "sent_files": publication.sent_files,
            "sent_bytes": publication.sent_bytes,
            "hidden": len(hidden),
        }
        click.echo(json.dumps(document))
        return
    if hidden:
        named = [*sorted(hidden)[:_MOST_NAMED], *(["…"] if len(hidden) > _MOST_NAMED else [])]
        say(f"trimsfs: left out {counted(len(hidden), 'hidden name')}: {', '.join(named)}", error=True)
    if not quiet:
        size = f"{counted(len(manifest.files), 'file')}, {decimal(manifest.size)}"
        if publication.repeated:
            say(f"{location}: already published, {size}")
            return
        say(f"{location}: published, {size}, of which {decimal(publication.sent_bytes)} were uploaded now")
        say(SEEN)
