"""``trimsfs node-labels``: labels that tell a Kubernetes scheduler which models a node has on disk."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import click

from trimsfs.cli.control_client import ask_each, check_answers, mount_over, read_json
from trimsfs.cli.ls import rows_below
from trimsfs.cli.output import reported, say
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import (
    ConfigurationError,
    NoSuchEntryError,
    NotMountedError,
    NotPermittedError,
    StoreAccessError,
    TrimsError,
)
from trimsfs.extras.kubernetes.node import Node, check_prefix, label_key, labels, patch
from trimsfs.mountinfo import Mount

PREFIX = "warm.trimsfs.dev"
MOST_LABELS = 256


@click.command(
    epilog=examples(
        "trimsfs node-labels /models",
        "trimsfs node-labels --key meta/llama-3",
        "kubectl get node N -o json | trimsfs node-labels --patch /models",
        "trimsfs node-labels --node $NODE_NAME --every 300 /models",
    )
)
@click.argument("mountpoint", type=Path, shell_complete=complete_mounted, required=False)
@click.option("--prefix", default=PREFIX, show_default=True, help="Prefix of the labels. Each mount needs its own.")
@click.option(
    "--depth", type=click.IntRange(1, 8), default=1, show_default=True, help="Directories in the name of a model."
)
@click.option(
    "--limit",
    type=click.IntRange(0, MOST_LABELS),
    default=64,
    show_default=True,
    help="Most labels: of the models with the most bytes on disk. 0 removes all.",
)
@click.option("--key", "model", metavar="MODEL", help="Print the label's key of a model, of any mount.")
@click.option("--patch", "as_patch", is_flag=True, help="Print a JSON merge patch of the node on standard input.")
@click.option("--node", metavar="NAME", help="Label this node, from a pod with a service account that may.")
@click.option("--every", type=click.IntRange(1, 86400), metavar="SECONDS", help="With --node: again and again.")
@reported
def node_labels(
    mountpoint: Path | None,
    prefix: str,
    depth: int,
    limit: int,
    model: str | None,
    as_patch: bool,
    node: str | None,
    every: int | None,
) -> None:
    """Tell which models are on disk, as labels of a node.

    For a node of Kubernetes. A label is the share of a model that is on disk, in percent, rounded down to tens:
    `warm.trimsfs.dev/llama=100`. Affinity of pods can ask for it by `operator: Gt`. A name that is not valid as a
    label's gets a hash.

    A patch and --node remove the labels of models that are not there any more. With --node, a mount that does not
    answer has no models.
    """
    check_prefix(prefix)
    if model is not None:
        say(label_key(prefix, model))
        return
    if mountpoint is None:
        raise ConfigurationError("which mount? give its directory, or --key MODEL")
    if every is not None and node is None:
        raise ConfigurationError("--every: give --node, too")
    if node is not None:
        _label(Node(node), mountpoint, prefix, depth, limit, every)
        return
    wanted = labels(prefix, _shares(mountpoint, depth, limit))
    if as_patch:
        click.echo(json.dumps(patch(prefix, _current(), wanted)))
        return
    for key, value in wanted.items():
        say(f"{key}={value}")


def _label(node: Node, mountpoint: Path, prefix: str, depth: int, limit: int, every: int | None) -> None:
    """Label a node, once or every so many seconds. Raises TrimsError if it is to be done once."""
    while True:
        try:
            change = patch(prefix, node.labels(), labels(prefix, _shares_there(mountpoint, depth, limit)))
            if change:
                node.apply(change)
                changed = change["metadata"]["labels"]
                say(", ".join(f"-{key}" if value is None else f"{key}={value}" for key, value in changed.items()))
        except TrimsError as error:
            if every is None:
                raise
            say(f"trimsfs: {error}: trying again in {every} s", error=True)
        if every is None:
            return
        sys.stdout.flush()
        time.sleep(every)


def _shares_there(mountpoint: Path, depth: int, limit: int) -> dict[str, float]:
    try:
        return _shares(mountpoint, depth, limit)
    except NotMountedError as error:
        say(f"trimsfs: {error}", error=True)
        return {}


def _shares(mountpoint: Path, depth: int, limit: int) -> dict[str, float]:
    """How much of each model is on disk, 0 to 1, of those with the most bytes there. Raises TrimsError."""
    ((_, answer),) = ask_each([mount_over(mountpoint)], partial(_shares_of, depth=depth, limit=limit))
    if isinstance(answer, TrimsError):
        raise answer
    return answer


def _shares_of(mount: Mount, *, depth: int, limit: int) -> dict[str, float]:
    check_answers(mount.mountpoint)
    sizes: dict[str, int] = {}
    for file in read_json(mount.mountpoint / ".trims/models")["models"]:
        model = "/".join(file["path"].split("/")[:depth])
        sizes[model] = sizes.get(model, 0) + file["residency"]["disk"]
    shares = {}
    for model in sorted(sizes, key=lambda model: (-sizes[model], model))[:limit]:
        try:
            rows = rows_below(mount.mountpoint / model, None).rows
        except (NoSuchEntryError, NotPermittedError, StoreAccessError):
            continue  # deleted in the store, or the credentials of its tenant have ended
        whole = sum(row.size for row in rows.values())
        shares[model] = sum(row.disk for row in rows.values()) / whole if whole else 0
    return shares


def _current() -> dict[str, str]:
    """The labels of the node on standard input. Raises ConfigurationError."""
    try:
        current: dict[str, str] = json.load(sys.stdin)["metadata"].get("labels", {})
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigurationError("standard input: is no node in JSON: `kubectl get node NAME -o json`") from None
    return current
