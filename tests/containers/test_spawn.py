"""Programs in containers are forked by a fork server of the host, which has the same files."""

from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest

from tests.containers.engines import Podman, Users
from tests.support.socket_servers import PYTHON, SELF, ServerAtSocket, serving

SAME_FILES = [f"--volume={path}:{path}:ro" for path in ("/usr", "/etc/ld.so.cache", *glob("/etc/python3*"))]
SAME_LINKS = [f"--volume=/usr/{name}:/{name}:ro" for name in ("lib", "lib64")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerAtSocket]:
    """A server of root on the host. Containers set these variables."""
    with serving(tmp_path, "--vary=HOME,PATH,TERM", start=["env", "--ignore-environment"]) as started:
        yield started


@pytest.mark.parametrize("options", [["--security-opt=seccomp=unconfined"], []], ids=["unconfined", "seccomp"])
def test_a_container_gets_a_fork_that_is_in_it(
    server: ServerAtSocket, podman: Podman, users: Users, options: list[str]
) -> None:
    (server.directory / "program.py").write_text(SELF)
    program = [PYTHON, str(server.directory / "program.py")]
    volumes = [*SAME_FILES, *SAME_LINKS, f"--volume={server.directory}:{server.directory}:ro"]
    both = f'{" ".join(program)}; echo ====; exec "$@"'
    line = ["sh", "-c", both, "sh", *server.line("--socket", str(server.path), "--", *program)]
    done = podman("run", "--rm", *users.podman, *options, *volumes, podman.image, *line)
    assert done.returncode == 0, done.stderr
    plain, forked = done.stdout.split("====\n")
    assert forked == plain
    if options:
        assert not done.stderr
    else:
        assert done.stderr == "trimsfs: not forked: a fork would have another seccomp than its caller\n"
