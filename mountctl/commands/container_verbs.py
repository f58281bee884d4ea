"""The ``mountctl`` commands for containers: attach, detach, cdi, oci-hook and share."""

import json
import sys
from pathlib import Path

import click

from mountctl.commands.outcome import reported
from mountctl.containers import attachment, hook, propagation
from mountctl.containers import cdi as devices
from mountctl.containers.attachment import BindSource, Target
from mountctl.containers.engines import ENGINES, process_of
from mountctl.containers.forked_work import TIMEOUT_S
from mountctl.containers.mountpoints import gpu_socket, mountpoint_of
from mountctl.linux.cdi_specs import WHOLE, default_output
from trimsfs.command_group import examples

LISTING_TIMEOUT_S = 20.0

_engine = click.option("--engine", type=click.Choice(list(ENGINES)), help="Ask only this engine for CONTAINER.")
_timeout = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 600),
    default=TIMEOUT_S,
    show_default=True,
    help="Seconds to wait for an answer.",
)


@click.command(
    epilog=examples(
        "mountctl attach my-container /models/llama", "mountctl attach my-container /models/llama --at /opt/llama"
    )
)
@click.argument("container")
@click.argument("path", type=Path)  # not click.Path, which asks the file system about it
@click.option("--at", metavar="TARGET", help="Where PATH appears in the container.  [default: PATH]")
@_engine
@_timeout
@reported
def attach(container: str, path: Path, at: str | None, engine: str | None, timeout_s: float) -> None:
    """Mount PATH in the running CONTAINER.

    PATH is a model, a whole mount, or the socket of its GPU clients. CONTAINER is a name that podman, docker, nerdctl
    or crictl knows, or the number of a process.
    """
    source = BindSource(str(path.absolute()))
    target = Target(process_of(container, engine), at or source.path)
    attachment.attach(source, target, timeout_s)
    click.echo(f"{source.path} is at {target.path} in {container}")


@click.command(epilog=examples("mountctl detach my-container /models/llama"))
@click.argument("container")
@click.argument("target")
@_engine
@_timeout
@reported
def detach(container: str, target: str, engine: str | None, timeout_s: float) -> None:
    """Unmount the model at TARGET in CONTAINER. Processes keep the files that they have open."""
    attachment.detach(Target(process_of(container, engine), target), timeout_s)
    click.echo(f"{target} is no longer in {container}")


@click.command(epilog=examples("mountctl cdi /models", "podman run --device trimsfs.dev/models=llama IMAGE"))
@click.argument("mountpoint", type=Path, required=False)
@click.option(
    "--output", type=Path, help="File to write, or - for standard output.  [default: /var/run/cdi/trimsfs-NAME.json]"
)
@click.option(
    "--depth", type=click.IntRange(1, 16), default=1, show_default=True, help="Levels of directories to list as models."
)
@click.option(
    "--class", "kind_class", default="models", show_default=True, help="Name the devices trimsfs.dev/CLASS=MODEL."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 600),
    default=LISTING_TIMEOUT_S,
    show_default=True,
    help="Seconds to wait for the list of models.",
)
@reported
def cdi(mountpoint: Path | None, output: Path | None, depth: int, kind_class: str, timeout_s: float) -> None:
    """Write a CDI spec of the models of a mount.

    Engines then start containers with models of MOUNTPOINT as devices.

    Each model is a device. Device `all` is the whole mount; device `gpu` is the socket of GPU clients, if there is one.
    If this host has only one mount, MOUNTPOINT may be left out. Run the command again when the store has new models.
    """
    mountpoint = mountpoint_of(mountpoint)
    listing = devices.list_models(mountpoint, depth, timeout_s)
    spec, follows = devices.spec_of(mountpoint, listing.models, kind_class, gpu_socket=gpu_socket(mountpoint))
    if listing.unnameable:
        click.echo(f"mountctl: {mountpoint}: {listing.unnameable} models left out: their names are not UTF-8", err=True)
    if not follows:
        click.echo(
            f"mountctl: device {WHOLE} does not follow a remount: mount in a directory that "
            "`mountctl share` has shared and that holds only mount points",
            err=True,
        )
    if output == Path("-"):
        click.echo(json.dumps(spec, indent=1))
        return
    output = output or default_output(mountpoint)
    devices.write(spec, output)
    click.echo(f"{output}: {len(listing.models)} models of {mountpoint} as {spec['kind']}=MODEL")


@click.command("oci-hook", epilog=examples("mountctl oci-hook < state.json"))
@reported
def oci_hook() -> None:
    """Mount models that annotations request (OCI hook).

    OCI runtimes run this at stage createRuntime.

    Reads the container's state on standard input. dev.trimsfs.models lists models, as `resnet50,bert=/opt/bert`.
    dev.trimsfs.mount is the mount point; it is needed if there are several mounts. dev.trimsfs.gpu=true requests the
    socket of GPU clients, with or without models.
    """
    state = hook.read_state(sys.stdin.fileno())
    if not hook.asks(state.annotations):
        return
    wanted = state.annotations.get(hook.MOUNT)
    mountpoint = mountpoint_of(
        None if wanted is None else Path(wanted), remedy=f"set annotation {hook.MOUNT} of the container to"
    )
    for source, target in hook.attachments(state, mountpoint):
        attachment.attach(source, target)


@click.command(epilog=examples("mountctl share /srv/mounts"))
@click.argument("directory", type=Path)
@reported
def share(directory: Path) -> None:
    """Share a directory of mounts with containers.

    Containers that bind DIRECTORY with rslave see later mounts below it.

    The sharing ends when the host restarts. DIRECTORY must hold only mount points.
    """
    if propagation.share(directory):
        click.echo(f"{directory} is shared")
    else:
        click.echo(f"{directory} is shared already: nothing to do")
