"""nginx as a cache in front of an S3 store, by the configuration that is packaged."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.network import Host

from . import HOST, ROOT, SCRATCH, accepts, reserved_ports, run_daemon

CONFIGURATION = ROOT / "packaging/nginx/s3-cache.conf"
START_S = 30
_WHOLE = """\
user root;
worker_processes 2;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{
    worker_connections 4096;
}}
http {{
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    sendfile on;
    include {directory}/s3-cache.conf;
}}
"""


@contextmanager
def start_caching_proxy(
    store_url: str, host: Host | None = None, *, log_file: Path | None = None, changes: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The endpoint URL of an empty cache until the context ends, on this host or on one of a network.

    *changes* replace parts of the configuration.
    """
    address, name = (host.address, host.name) if host else (HOST, HOST)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimsfs-cache-", dir=SCRATCH)))
        port = stack.enter_context(reserved_ports())[0]
        text = CONFIGURATION.read_text()
        yours = {
            "/var/cache/nginx-models": str(directory / "cache"),
            "10.0.0.5:9000": urlsplit(store_url).netloc,
            "10.0.0.9:9000": f"{name}:{port}",
        }
        for old, new in {**yours, **(changes or {})}.items():
            assert text.count(old) == 1, f"{CONFIGURATION}: {old}"
            text = text.replace(old, new)
        (directory / "s3-cache.conf").write_text(text)
        (directory / "nginx.conf").write_text(_WHOLE.format(directory=directory))
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
        assert program is not None, "nginx is not installed: install the package nginx-light"
        command = [
            *(host.namespace.before if host else ()),
            program,
            "-e",
            "stderr",
            "-c",
            str(directory / "nginx.conf"),
        ]
        log = log_file or directory / "nginx.log"
        daemon = stack.enter_context(run_daemon("nginx", [*command, "-g", "daemon off;"], log, os.environ))

        def answers() -> bool:
            return accepts(port, address)

        daemon.wait_until((lambda: host.namespace.call(answers)) if host else answers, START_S)
        yield f"http://{name}:{port}"
