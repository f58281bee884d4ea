"""Cloud stores, mounted: stand-ins serve, fetch processes fetch, and the digest that the store tells is compared."""

import errno
import random
from pathlib import Path

import pytest

from tests.contract.backends import AzureBackend, GoogleBackend, new_container, new_google_bucket
from tests.services.azurite import Azurite
from tests.services.fake_gcs import GoogleServer
from tests.support.mounts import mounted, wait_until

MIB = 1 << 20
SIZE = 20 * MIB + 5


@pytest.mark.parametrize(("kind", "algorithm"), [("fake_gcs", "crc32c"), ("azurite", "md5")])
def test_a_model_is_fetched_once_and_compared_with_the_digest_of_the_cloud(
    kind: str, algorithm: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server: GoogleServer | Azurite = request.getfixturevalue(kind)
    backend: GoogleBackend | AzureBackend = (
        new_google_bucket(server) if isinstance(server, GoogleServer) else new_container(server)
    )
    old, new = (random.Random(seed).randbytes(SIZE) for seed in (1, 2))
    backend.put("models/net/weights", old)
    options = ["--metadata-ttl", "0.2", "fetch_processes=2", "--digests", "wait", "--cold-open", "wait"]
    url = backend.options("models").store
    assert url is not None
    with mounted(url, tmp_path, *options, environment=server.environment()) as mount:
        path = mount.path / "net/weights"
        with path.open("rb") as file:
            assert file.read() == old
            assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == SIZE
            assert mount.info("net/weights")["digest"].startswith(f"{algorithm}:")
            backend.put("models/net/weights", new)
            wait_until(lambda: path.read_bytes() == new)
            file.seek(0)
            assert file.read() == old  # an open file keeps its generation


@pytest.mark.parametrize("kind", ["fake_gcs", "azurite"])
def test_a_model_that_is_replaced_while_it_is_read_is_never_mixed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server: GoogleServer | Azurite = request.getfixturevalue(kind)
    backend: GoogleBackend | AzureBackend = (
        new_google_bucket(server) if isinstance(server, GoogleServer) else new_container(server)
    )
    backend.put("weights", b"a" * SIZE)
    options = ["--metadata-ttl", "0.2", "--cold-open", "stream", "--prefetch", "off"]
    url = backend.options().store
    assert url is not None
    with mounted(url, tmp_path, *options, environment=server.environment()) as mount:
        (mount.path / "weights").stat()
        with (mount.path / "weights").open("rb", buffering=0) as file:
            backend.put("weights", b"b" * SIZE)
            with pytest.raises(OSError, match="Stale") as caught:
                assert file.read(MIB) == b""
            assert caught.value.errno == errno.ESTALE
        wait_until(lambda: (mount.path / "weights").read_bytes() == b"b" * SIZE)
