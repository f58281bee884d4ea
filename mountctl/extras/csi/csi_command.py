"""The command ``mountctl csi``. Imports the packages of the extra ``csi`` only when it runs."""

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from trimsfs.command_group import examples
from trimsfs.text import LineFormatter

NODE_ID_LIMIT = 256


@click.command(epilog=examples("mountctl csi --endpoint unix:///csi/csi.sock --node-id node-1"))
@click.option("--endpoint", required=True, envvar="CSI_ENDPOINT", help="Socket to serve: unix:///DIRECTORY/NAME.")
@click.option("--node-id", required=True, help="Name of this node in the cluster.")
@click.option(
    "--mounts-dir",
    type=Path,
    default=Path("/var/lib/trimsfs/mounts"),
    show_default=True,
    help="Directory with the mounts that pods may use.",
)
@click.option("--tenants", type=Path, help="TOML file: which namespaces may use which models.  [default: no limits]")
@click.option(
    "--tokens-dir",
    type=Path,
    help="Directory in which servers find the tokens of pods' service accounts.  [default: tokens are not kept]",
)
def csi(endpoint: str, node_id: str, mounts_dir: Path, tenants: Path | None, tokens_dir: Path | None) -> None:
    """Serve a CSI driver for Kubernetes.

    Pods get models of this node's mounts as read-only volumes, inline or of a PersistentVolume.

    Runs as root until SIGTERM; volumes stay mounted then. Exit codes: 0 ended, 1 cannot serve the socket or write to
    the directory of tokens, 2 invalid option.
    """
    try:
        from mountctl.extras.csi.csi_server import EndpointError, EndpointNameError, serve  # noqa: PLC0415
        from mountctl.extras.csi.service_account_tokens import ServiceAccountTokens  # noqa: PLC0415
        from mountctl.extras.csi.tenants import TenantsError, read_tenants  # noqa: PLC0415
    except ModuleNotFoundError as error:
        _fail(2, f"csi: the package of {error.name} is missing: pip install 'trimsfs[csi]'")
    if not node_id or len(node_id.encode()) > NODE_ID_LIMIT:
        _fail(2, f"--node-id {node_id[:40]!r}: must have 1 to {NODE_ID_LIMIT} bytes")
    if not mounts_dir.is_absolute() or not mounts_dir.is_dir():
        _fail(2, f"--mounts-dir {mounts_dir}: give the absolute path of an existing directory")
    if tokens_dir is not None and not (tokens_dir.is_absolute() and tokens_dir.parent.is_dir()):
        _fail(2, f"--tokens-dir {tokens_dir}: give an absolute path in an existing directory")
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        tokens = None if tokens_dir is None else ServiceAccountTokens(tokens_dir)
    except OSError as error:
        _fail(1, f"--tokens-dir {tokens_dir}: {error.strerror}: run it as root, with a directory that it may write to")
    try:
        if tenants is not None:
            read_tenants(tenants)
        serve(
            endpoint=endpoint,
            node_id=node_id,
            mounts_dir=Path(os.path.realpath(mounts_dir)),
            tenants=tenants,
            tokens=tokens,
        )
    except TenantsError as error:
        _fail(2, f"--tenants {error}")
    except EndpointError as error:
        _fail(2 if isinstance(error, EndpointNameError) else 1, str(error))


def _fail(code: int, message: str) -> NoReturn:
    click.echo(f"mountctl: {message}", err=True)
    sys.exit(code)
