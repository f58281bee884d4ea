"""A container with an overlay of its own over a mount: podman's volumes with ``:O``."""

import hashlib

from tests.containers.engines import Podman
from tests.containers.host import Host
from tests.support.mounts import MountedStore, trimsfs

MODEL = "resnet50/params"


def test_an_overlay_of_a_container_shows_models_in_any_state_and_can_be_written_to(
    podman: Podman, models: MountedStore, host: Host
) -> None:
    wanted = hashlib.sha256(host.content(MODEL)).hexdigest()
    with podman.started("--volume", f"{models.path}:/models:O") as container:
        for change in ("warm", "evict", "warm", "evict"):
            for _ in range(2):
                assert container.read("sha256sum", f"/models/{MODEL}").split()[0] == wanted
            assert trimsfs(change, models.path / MODEL).returncode == 0
        assert container.read("sh", "-c", "echo mine > /models/note; cat /models/note") == "mine\n"
    assert not (models.path / "note").exists()
