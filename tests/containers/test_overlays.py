"""A container with an overlay of its own over a mount: podman's volumes with ``:O``."""

from pathlib import Path

from tests.containers.engines import Podman
from tests.containers.host import Host
from tests.support.mounts import MountedStore, mounted, trimsfs

MODEL = "resnet50/params"


def test_an_overlay_of_a_container_shows_models_in_any_state_and_can_be_written_to(
    podman: Podman, models: MountedStore, host: Host
) -> None:
    wanted = host.digest(MODEL)
    with podman.started("--volume", f"{models.path}:/models:O") as container:
        for change in ("warm", "evict", "warm", "evict"):
            for _ in range(2):
                assert container.read("sha256sum", f"/models/{MODEL}").split()[0] == wanted
            assert trimsfs(change, models.path / MODEL).returncode == 0
        assert container.read("sh", "-c", "echo mine > /models/note; cat /models/note") == "mine\n"
    assert not (models.path / "note").exists()


def test_a_mount_that_is_a_layer_of_a_container_stays_and_the_container_is_named(
    podman: Podman, host: Host, tmp_path: Path
) -> None:
    with (
        mounted(host.store, tmp_path) as mount,
        podman.started("--volume", f"{mount.path}/resnet50:{mount.path}/resnet50:O") as container,
    ):
        told = f"the overlay at {mount.path}/resnet50 in the mount namespace of pid {container.pid} (sleep"
        done = trimsfs("umount", mount.path)
        assert (done.returncode, told in done.stderr) == (12, True), done.stderr
        assert container.read("sha256sum", f"{mount.path}/{MODEL}").split()[0] == (host.digest(MODEL))
