"""An artifact of a real registry, mounted."""

import hashlib
import random
from pathlib import Path

from tests.services.registry import (
    MODEL,
    Layer,
    Registry,
    log_in,
    packed,
    password_of,
    start_registry,
    titled,
)
from tests.support.mounts import mounted, trimsfs

MIB = 1 << 20


def test_an_artifact_is_mounted_with_roots_credentials_and_its_tag_is_followed(
    registry: Registry, tmp_path: Path
) -> None:
    draw = random.Random(1)
    same, old, new, member = (draw.randbytes(20 * MIB + number) for number in range(4))
    archive = Layer(packed({"tar/first": b"x" * 5000, "tar/member": member}), f"{MODEL}.weight.v1.tar")
    registry.push("mounted/model:prod", [titled("same", same), titled("model", old), archive])
    home = tmp_path / "docker"
    home.mkdir(mode=0o700)  # which the server's user cannot enter
    with start_registry(password_of(tmp_path), data=registry.directory) as guarded:
        log_in(home, guarded.address)
        store = f"oci://{guarded.address}/mounted/model:prod"
        environment = {"DOCKER_CONFIG": str(home)}
        with mounted(store, tmp_path / "mount", "--cold-open", "wait", environment=environment) as mount:
            for name, content in (("same", same), ("model", old), ("tar/member", member)):
                assert (mount.path / name).read_bytes() == content
            assert trimsfs("verify", mount.path / "model").returncode == 0  # at once, and not when it is at rest
            assert mount.info("model")["verified"]
            assert mount.info("model")["digest"] == f"sha256:{hashlib.sha256(old).hexdigest()}"
            fetched = mount.metrics()["trimsfs_fetch_fetched_bytes_total"]

            with (mount.path / "model").open("rb") as held:
                registry.push("mounted/model:prod", [titled("same", same), titled("model", new), archive])
                assert trimsfs("refresh", mount.path).returncode == 0
                assert (mount.path / "model").read_bytes() == new
                assert held.read() == old
            assert (mount.path / "same").read_bytes() == same
            assert (mount.path / "tar/member").read_bytes() == member
            assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == fetched + len(new)
