"""``trimsfs versions``, ``alias``, ``rollback`` and ``rm``: what a publisher does with a model's versions."""

import json
import re
from datetime import timedelta
from functools import partial
from typing import Any

import click
from rich.filesize import decimal

from trimsfs.cli.output import reported, say, show
from trimsfs.command_group import examples
from trimsfs.errors import ConfigurationError, NoSuchEntryError
from trimsfs.extras.versions import alias as aliases
from trimsfs.extras.versions import removal
from trimsfs.extras.versions.catalog import Catalog, Contents
from trimsfs.extras.versions.commands.store_options import SEEN, run_on_catalog, single_writer, store_options
from trimsfs.extras.versions.location import parse_model, parse_version
from trimsfs.formats import version_records
from trimsfs.formats.table import FormatError
from trimsfs.formats.version_records import Alias, check_alias, check_version

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_model = click.argument("model", metavar="STORE/NAME")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_S = 10 * 365 * 86400


class _Duration(click.ParamType):  # type: ignore[type-arg]  # older versions of click have no arguments
    name = "duration"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"(\d{1,9})([smhd]?)", value)
        seconds = int(match[1]) * _UNITS[match[2] or "s"] if match else -1
        if not 0 <= seconds <= _LONGEST_S:
            self.fail(f"{value} is not a time such as 30m, 1h or 7d", parameter, context)
        return timedelta(seconds=seconds)


@click.command(epilog=examples("trimsfs versions s3://my-models/llama"))
@_model
@_as_json
@store_options
@reported
def versions(model: str, as_json: bool, reach: dict[str, Any]) -> None:
    """List the versions and aliases of a model.

    Also those that are removed but not yet deleted, and pushes that have not ended.
    """
    contents = run_on_catalog(lambda catalog: catalog.contents(), parse_model(model), reach)
    if not (contents.manifests or contents.aliases or contents.unfinished):
        raise NoSuchEntryError(f"{model}: it has no versions: check the spelling; `trimsfs push` makes one")
    if as_json:
        click.echo(json.dumps(_described(contents), indent=2))
        return
    leading: dict[str, list[str]] = {}
    for name, alias in contents.aliases.items():
        leading.setdefault(alias.version, []).append(name)
    rows = [("VERSION", "FILES", "SIZE", "CREATED", "ALIASES")]
    for version, manifest in contents.manifests.items():
        created = version_records.text(manifest.created)
        names = ", ".join(leading.get(version, []))
        tombstone = contents.removed.get(version)
        if tombstone is not None:
            names = f"(removed, kept until {version_records.text(tombstone.delete_after)})"
        rows.append((version, str(len(manifest.files)), decimal(manifest.size), created, names))
    for version, reservation in contents.unfinished.items():
        rows.append((version, "", "", "", f"(unfinished push of {version_records.text(reservation.started)})"))
    show(rows, left=1, last=True)


def _described(contents: Contents) -> dict[str, object]:
    return {
        "versions": [
            {
                "version": version,
                "files": len(manifest.files),
                "bytes": manifest.size,
                "created": version_records.text(manifest.created),
                "removed": version in contents.removed,
                "kept_until": version_records.text(contents.removed[version].delete_after)
                if version in contents.removed
                else None,
            }
            for version, manifest in contents.manifests.items()
        ],
        "aliases": {
            name: {"version": alias.version, "history": list(alias.history), "moved": version_records.text(alias.moved)}
            for name, alias in contents.aliases.items()
        },
        "unfinished": list(contents.unfinished),
    }


@click.command(
    epilog=examples("trimsfs alias s3://my-models/llama prod v2", "trimsfs alias s3://my-models/llama canary v3")
)
@_model
@click.argument("alias", metavar="ALIAS")
@click.argument("version", metavar="VERSION")
@single_writer
@store_options
@reported
def alias(model: str, alias: str, version: str, single_writer: bool, reach: dict[str, Any]) -> None:
    """Let an alias lead to a version.

    One request to the store moves it. Of two people who move an alias at the same time, one is refused.
    """
    name, target, conditions = _checked(check_alias, alias), _checked(check_version, version), not single_writer
    move = partial(aliases.move, alias=name, version=target, conditions=conditions)
    moved = run_on_catalog(move, parse_model(model), reach, conditions=conditions)
    _tell(alias, moved)
    if not moved.history:  # a name that mounts may not know
        say(SEEN)


@click.command(epilog=examples("trimsfs rollback s3://my-models/llama prod"))
@_model
@click.argument("alias", metavar="ALIAS")
@single_writer
@store_options
@reported
def rollback(model: str, alias: str, single_writer: bool, reach: dict[str, Any]) -> None:
    """Let an alias lead to the version before.

    Each further rollback goes one version further back. Removed versions are skipped.
    """
    name, conditions = _checked(check_alias, alias), not single_writer
    back = partial(aliases.rollback, alias=name, conditions=conditions)
    moved = run_on_catalog(back, parse_model(model), reach, conditions=conditions)
    _tell(alias, moved)


@click.command(
    epilog=examples(
        "trimsfs rm s3://my-models/llama:v1",
        "trimsfs rm --grace 7d s3://my-models/llama:v1",
        "trimsfs rm --expired s3://my-models/llama",
    )
)
@click.argument("target", metavar="STORE/NAME[:VERSION]")
@click.option(
    "--grace",
    type=_Duration(),
    metavar="TIME",
    default="1h",
    show_default=True,
    help="How long the files stay for readers that have them open: 30m, 1h, 7d.",
)
@click.option("--expired", is_flag=True, help="Delete the files of removed versions whose time is over.")
@click.option("--unfinished", is_flag=True, help="Delete what a dead push has left of VERSION.")
@single_writer
@store_options
@reported
def rm(
    target: str, grace: timedelta, expired: bool, unfinished: bool, single_writer: bool, reach: dict[str, Any]
) -> None:
    """Remove a version of a model.

    Mounts show the version no more. Its files are deleted by the first push or rm of this model after the grace period.

    A version that an alias leads to is not removed; the exit code is then 12.
    """
    if expired and unfinished:
        raise ConfigurationError("options --expired and --unfinished: give one of them")
    location = parse_model(target) if expired else parse_version(target)
    version = location.version or ""

    async def act(catalog: Catalog) -> tuple[str, list[str]]:
        if unfinished:
            await removal.remove_unfinished(catalog, version)
            return f"{location}: deleted what its push had left", []
        if expired:
            return "", await removal.expire(catalog)
        tombstone = await removal.remove(catalog, version, grace)
        deleted = await removal.expire(catalog)
        return f"{location}: removed; its files stay until {version_records.text(tombstone.delete_after)}", deleted

    message, deleted = run_on_catalog(act, location, reach, conditions=not single_writer)
    if message and version not in deleted:
        say(message)
    for one in deleted:
        say(f"{parse_model(target) if expired else location.store + '/' + location.name}:{one}: its files are deleted")
    if expired and not deleted:
        say(f"{location}: no removed version whose grace period is over")


def _checked(check: Any, name: str) -> str:
    try:
        return str(check(name))
    except FormatError as error:
        raise ConfigurationError(str(error)) from None


def _tell(name: str, moved: Alias) -> None:
    before = f", before to {moved.history[0]}" if moved.history else ""
    say(f"{name} leads to {moved.version}{before}")
