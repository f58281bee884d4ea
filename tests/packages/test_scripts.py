"""The scripts of the Debian package, with a real mount; the commands that they call are stand-ins."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.mounts import mounted

DEBIAN = Path(__file__).parents[2] / "packaging/debian"


@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [
        ("trimsfs.prerm", ("remove",), "trimsfs umount --everywhere --lazy"),
        ("trimsfs.postinst", ("configure", "0.1"), "mountctl upgrade"),
    ],
)
def test_scripts_reach_mount_points_with_spaces(
    script: str, arguments: tuple[str, ...], command: str, tmp_path: Path, store_directory: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("trimsfs", "mountctl", "systemctl"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> "{tmp_path}/called"\n')
        program.chmod(0o755)
    place = tmp_path / "my\\ models"
    place.mkdir()
    with mounted(store_directory, place) as mount:
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        subprocess.run(["dash", DEBIAN / script, *arguments], env={"PATH": path}, check=True, timeout=60)

    assert f"{command} {mount.path}" in (tmp_path / "called").read_text().splitlines()


def test_nothing_but_the_scripts_of_the_package_restarts_services() -> None:
    """debhelper would restart nginx, which an upgrade only reloads."""
    (command,) = [
        line for line in (DEBIAN / "rules").read_text().splitlines() if line.startswith("\tdh_installsystemd")
    ]
    assert {"--no-enable", "--no-start", "--no-restart-after-upgrade"} <= set(command.split())
    assert "systemctl try-reload-or-restart trimsfs-nginx.service" in (DEBIAN / "trimsfs.postinst").read_text()


def test_purge_empties_a_cache_that_is_a_mount_point() -> None:
    """In a mount namespace with another /etc and /var."""
    script = """
        for directory in /etc /var; do mount -t tmpfs tmpfs $directory; done
        mkdir -p /etc/trimsfs /var/cache/trimsfs /var/log/trimsfs
        mount -t tmpfs tmpfs /var/cache/trimsfs
        touch /etc/trimsfs/config.toml /var/cache/trimsfs/blob
        sh "$1" purge
        find /etc /var -mindepth 1
    """
    command = ["unshare", "--mount", "sh", "-euc", script, "sh", str(DEBIAN / "trimsfs.postrm")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert sorted(done.stdout.split()) == ["/var/cache", "/var/cache/trimsfs", "/var/log"]
