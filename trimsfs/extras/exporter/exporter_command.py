"""``trimsfs exporter``: metrics of all mounts of this host over HTTP, and a status page."""

import logging
import os
import sys
from pathlib import Path

import click

from trimsfs.cli.output import reported, say
from trimsfs.command_group import examples
from trimsfs.errors import ConfigurationError
from trimsfs.extras.exporter.exporter import listen, read_token, run
from trimsfs.extras.exporter.scraper import ANSWER_TIMEOUT_S
from trimsfs.listen_address import ListenAddress, parse_address
from trimsfs.text import LineFormatter

DEFAULT = "127.0.0.1:9099"


@click.command(
    epilog=examples(
        "trimsfs exporter",
        "trimsfs exporter --listen unix:/run/trimsfs/metrics.sock",
        "trimsfs exporter --listen 0.0.0.0:9099 --token-file /etc/trimsfs/metrics.token",
    )
)
@click.option("--listen", "place", metavar="ADDRESS", default=DEFAULT, show_default=True, help="IP:PORT or unix:PATH.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with a token, which clients then have to send. Needed for addresses that other hosts reach.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.1, max=60),
    metavar="S",
    default=ANSWER_TIMEOUT_S,
    show_default=True,
    help="Seconds that a mount has to answer; less than Prometheus' scrape_timeout.",
)
@click.option("--while-mounted", is_flag=True, hidden=True, help="In the background; end with the last mount.")
@reported
def exporter(place: str, token_file: Path | None, timeout_s: float, while_mounted: bool) -> None:
    """Serve metrics of all mounts, and a status page.

    Prometheus scrapes /metrics, browsers show /, programs read /api/status. Without a token it tells what every user of
    this host may see. With one, root's exporter also tells of tenants, of models and of who uses them.
    """
    try:
        address = parse_address(place)
    except ValueError as error:
        raise ConfigurationError(f"option --listen {place}: {error}") from None
    if token_file is None and not address.local:
        remedy = "set --token-file FILE, or use 127.0.0.1"
        raise ConfigurationError(f"option --listen {place}: other hosts reach that: {remedy}")
    token = read_token(token_file) if token_file is not None else None
    listener = listen(address, shared=while_mounted)
    if listener is None:
        return
    if while_mounted:
        _go_to_background()
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if address.path is None:
        address = ListenAddress(address.host, listener.getsockname()[1])
    listening = f"listening at {address if address.path else f'http://{address}/'}"
    if while_mounted:
        logging.getLogger(__name__).info(listening)  # a log has times
    else:
        say(listening)
    run(listener, token, timeout_s=timeout_s, while_mounted=while_mounted)


def _go_to_background() -> None:
    """Have whoever started this process go on, and log to what was standard output."""
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(1, 2)
