"""Models that appear in containers and processes that run already."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.containers.engines import SUB_IDS, USERS, Podman, PodmanContainer, Users, mountctl, running
from tests.containers.host import Host
from tests.support.keepers import hanging
from tests.support.mounts import MOUNTCTL, MountedStore, mounted, wait_until


def mounts_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/mountinfo").read_text().splitlines()


def seen_by(pid: int, path: str) -> bytes:
    return Path(f"/proc/{pid}/root{path}").read_bytes()


def attached(container: PodmanContainer, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return mountctl("attach", container.name, *arguments, environment=container.podman.environment)


def test_a_model_comes_to_a_running_container_and_goes(
    podman: Podman, models: MountedStore, host: Host, users: Users
) -> None:
    model = models.path / "resnet50"
    with podman.started(*users.podman) as container:
        user = f"{users.user}:{users.user}"
        done = attached(container, model)
        assert (done.returncode, done.stderr) == (0, "")
        assert container.read("sha256sum", f"{model}/params", user=user).split()[0] == host.digest("resnet50/params")
        (line,) = [line for line in mounts_of(container.pid) if str(model) in line]
        assert {"ro", "nosuid", "nodev"} <= set(line.split()[5].split(","))
        assert line.split()[6] == "-", "its changes are told to nobody"
        made = Path(f"/proc/{container.pid}/root{model.parent}").stat()
        assert (made.st_uid, made.st_gid) == ((SUB_IDS, SUB_IDS) if users.namespace else (0, 0))

        done = mountctl("detach", container.name, model, environment=podman.environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert container.read("ls", str(model)) == ""
        assert [line for line in mounts_of(container.pid) if str(model) in line] == []
    assert (model / "params").read_bytes() == host.content("resnet50/params")


def test_a_file_or_the_whole_mount_can_be_given(podman: Podman, models: MountedStore, host: Host) -> None:
    with podman.started() as container:
        assert attached(container, models.path / "bert/params", "--at", "/opt/deeper/bert").returncode == 0
        assert attached(container, models.path, "--at", "/models").returncode == 0
        assert seen_by(container.pid, "/opt/deeper/bert") == host.content("bert/params")
        assert container.read("ls", "/models").split() == ["bert", "resnet50", "tenant-a", "tenant-b"]


@pytest.mark.parametrize(
    "command",
    [
        ("unshare", "--mount"),
        ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "unshare", "--user", "--mount"),
        ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "unshare", "-r", "--mount"),
        ("bwrap", "--bind", "/", "/"),
        ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "bwrap", "--bind", "/", "/", "--uid", "7"),
    ],
    ids=["unshare", "unshare-nobody", "unshare-namespace", "bubblewrap", "bubblewrap-user"],
)
def test_a_model_comes_to_a_plain_process(
    command: tuple[str, ...], models: MountedStore, host: Host, outside: Path
) -> None:
    # A target that exists: in a user namespace its root cannot make one in a directory of the host.
    target = outside.parent / "target"
    target.mkdir()
    with running(*command, "sh", "-c", "echo started; exec sleep 300") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        pid = int(children[0]) if children else process.pid
        done = mountctl("attach", str(pid), models.path / "bert", "--at", target)
        assert (done.returncode, done.stderr) == (0, "")
        assert seen_by(pid, f"{target}/params") == host.content("bert/params")
        assert os.listdir(target) == []
        assert mountctl("detach", str(pid), target).returncode == 0
        assert os.listdir(f"/proc/{pid}/root{target}") == []


def test_links_of_a_container_lead_nowhere_but_into_it(podman: Podman, models: MountedStore, outside: Path) -> None:
    with podman.started() as container:
        up = "../" * 20
        container.read("sh", "-c", f"mkdir -p {outside}; ln -s {outside} /absolute; ln -s {up}{outside} /relative")
        for name in ("absolute", "relative"):
            assert attached(container, models.path / "bert", "--at", f"/{name}/{name}").returncode == 0
            assert container.read("ls", f"{outside}/{name}") == "params\n"


def test_a_container_that_moves_its_directories_gets_nothing_made_elsewhere(
    podman: Podman, models: MountedStore, outside: Path
) -> None:
    swap = f"while :; do mkdir /a; rmdir /a; ln -s {'../' * 20}{outside} /a; rm -r /a; done 2>/dev/null"
    with podman.started(command=("sh", "-c", swap)) as container:
        pid = str(container.pid)
        codes = [
            mountctl("attach", pid, models.path / "bert", "--at", f"/a/{number}/x").returncode for number in range(20)
        ]
        assert set(codes) <= {0, 4}
        assert os.listdir(outside) == []


def test_links_that_would_lead_out_of_a_root_are_not_followed(root: Path, models: MountedStore, outside: Path) -> None:
    """As those of /proc would lead a process that sees those of the host."""
    link = f"/proc/{os.getpid()}/root{outside}"
    script = f"mount --bind {root} {root}; mount -t proc none {root}/proc; mount -t tmpfs none {root}/tmp; "
    script += f"ln -s {link} {root}/tmp/link; ln -s {'../' * 20}{outside} {root}/tmp/up; "
    script += f"exec chroot {root} sh -c 'echo started; exec sleep 300'"
    with running("unshare", "--mount", "sh", "-ec", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert os.path.samefile(f"/proc/{process.pid}/root/tmp/link/", outside), "as the link leads out"
        for target in (f"{link}/model", link, "/tmp/link/model", "/tmp/link", "/tmp/up/model"):
            done = mountctl("attach", str(process.pid), models.path / "bert", "--at", target)
            assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
        assert mountctl("attach", str(process.pid), models.path / "bert", "--at", "/tmp/bert").returncode == 0
        assert seen_by(process.pid, "/tmp/bert/params") == (models.path / "bert/params").read_bytes()


@pytest.mark.parametrize("privilege", [("--cap-add", "SYS_ADMIN"), tuple(USERS["namespace"].podman)])
def test_no_container_can_write(podman: Podman, models: MountedStore, privilege: tuple[str, ...]) -> None:
    with podman.started(
        *privilege, "--cap-add", "SYS_ADMIN", "--user", "0:0", "--security-opt", "seccomp=unconfined"
    ) as container:
        assert attached(container, models.path / "bert", "--at", "/bert").returncode == 0
        done = container.execute("probe", "writable", "/bert", user="0")
        assert done.returncode == 1
        assert done.stdout in {"remount: Operation not permitted\n", "write: Read-only file system\n"}
    assert not (models.path / "bert/intruder").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["CONTAINER", "MODELS/bert", "--at", "opt"], 2, "give an absolute path"),
        (["CONTAINER", "MODELS/bert", "--at", "/opt/../x"], 2, "give an absolute path"),
        (["CONTAINER", "MODELS/bert", "--at", "/"], 2, "give an absolute path"),
        (["CONTAINER", "MODELS/.trims"], 2, "control files"),
        (["CONTAINER", "MODELS/bert/.trims/params/info", "--at", "/info"], 2, "control files"),
        (["CONTAINER", "MODELS/none"], 13, "MODELS/none: does not exist: see `trimsfs ls`"),
        (["CONTAINER", "/etc", "--at", "/opt"], 10, "/etc: not on a trimsfs mount"),
        (["CONTAINER", "MODELS/bert", "--at", "/proc"], 4, "/proc: lies on a kernel file system"),
        (["CONTAINER", "MODELS/bert", "--at", "/proc/x"], 4, "/proc/x: lies on a kernel file system"),
        (["CONTAINER", "MODELS/bert", "--at", "/sys/kernel"], 4, "/sys/kernel: lies on a kernel file system"),
        (["CONTAINER", "MODELS/bert", "--at", "/etc/passwd"], 4, "/etc/passwd: is a file, the model is a directory"),
        (["CONTAINER", "MODELS/bert", "--at", "/etc/passwd/x"], 4, "/etc/passwd/x: Not a directory"),
        (["CONTAINER", "MODELS/bert/params", "--at", "/etc"], 4, "/etc: is a directory"),
        (["no-such-container", "MODELS/bert"], 13, "no-such-container: no such container"),
        (["--", "-x", "MODELS/bert"], 2, "neither a container's name nor the number"),
        (["2147483647", "MODELS/bert"], 13, "process 2147483647: no such process"),
        (["SELF", "MODELS/bert"], 2, "is in the mount namespace of the host"),
        (["CONTAINER", "MODELS/bert", "--engine", "crictl"], 15, "crictl is not installed"),
    ],
)
def test_what_cannot_be_attached_gives_one_line_and_its_exit_code(
    arguments: list[str], code: int, message: str, podman: Podman, models: MountedStore, busy: PodmanContainer
) -> None:
    def filled(text: str) -> str:
        return (
            text.replace("CONTAINER", busy.name).replace("MODELS", str(models.path)).replace("SELF", str(os.getpid()))
        )

    before = mounts_of(busy.pid)
    done = mountctl("attach", *map(filled, arguments), environment=podman.environment)

    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith("mountctl: ")
    assert filled(message) in done.stderr
    assert mounts_of(busy.pid) == before


@pytest.fixture(scope="module")
def busy(podman: Podman) -> Iterator[PodmanContainer]:
    """A container for tests that leave it as it is."""
    with podman.started() as container:
        yield container


def test_a_read_only_container_is_told_of(podman: Podman, models: MountedStore) -> None:
    with podman.started("--read-only") as container:
        done = attached(container, models.path / "bert", "--at", "/made")
        assert (done.returncode, "cannot be created in the container: Read-only" in done.stderr) == (4, True)
        assert attached(container, models.path / "bert", "--at", "/opt").returncode == 0


def test_what_is_there_is_not_covered_and_what_is_not_is_not_taken_away(
    busy: PodmanContainer, models: MountedStore
) -> None:
    arguments = (models.path / "bert", "--at", "/once")
    assert attached(busy, *arguments).returncode == 0
    done = attached(busy, *arguments)
    assert (done.returncode, "mountctl detach" in done.stderr) == (4, True)
    for target in ("/opt", "/proc", "/once/params"):
        done = mountctl("detach", str(busy.pid), target)
        assert (done.returncode, "no trimsfs mount in the container" in done.stderr) == (10, True), target
    assert mountctl("detach", str(busy.pid), "/once/").returncode == 0, "as completed by a shell"


def test_other_users_may_not(busy: PodmanContainer, models: MountedStore) -> None:
    # The interpreter may lie in root's home: reading is all that is allowed beyond what any user may.
    reader = ["--bounding-set=-all,+dac_read_search", "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", *reader]
    command = [*user, sys.executable, MOUNTCTL, "attach", str(busy.pid), str(models.path / "bert")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (11, 1), done.stderr
    assert "run this as root" in done.stderr


def test_a_mount_that_does_not_answer_is_not_waited_for(
    busy: PodmanContainer, store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "model").mkdir()
    (store_directory / "model/params").write_bytes(b"weights")
    with mounted(store_directory, tmp_path) as mount:
        with hanging(mount):
            for command in (("attach", str(busy.pid), mount.path / "model"), ("cdi", mount.path, "--output", "-")):
                done = mountctl(*command, "--timeout", "1")
                assert (done.returncode, "no answer" in done.stderr, done.stderr.count("\n")) == (16, True, 1)
        assert mountctl("attach", str(busy.pid), mount.path / "model", "--at", "/late").returncode == 0
        assert mountctl("detach", str(busy.pid), "/late").returncode == 0


STAND_IN = """#!/bin/sh
echo "$0 $*" >>"$STAND_IN_LOG"
[ "$STAND_IN_ANSWER" ] && echo "$STAND_IN_ANSWER" && exit 0
echo "no container with name or ID" >&2
exit 1
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Stand-ins for engines that are not installed here: they tell a process, and write down how they were asked."""

    def made(*names: str, answer: str) -> dict[str, str]:
        directory = tmp_path / "bin"
        directory.mkdir(exist_ok=True)
        for name in names:
            (directory / name).write_text(STAND_IN)
            (directory / name).chmod(0o755)
        return {"PATH": f"{directory}:/bin", "STAND_IN_LOG": str(tmp_path / "log"), "STAND_IN_ANSWER": answer}

    return made


@pytest.mark.parametrize("engine", ["docker", "nerdctl", "crictl"])
def test_stand_ins_of_other_engines_are_asked_for_the_process(
    engine: str,
    stand_ins: Callable[..., dict[str, str]],
    busy: PodmanContainer,
    models: MountedStore,
    tmp_path: Path,
) -> None:
    environment = stand_ins(engine, answer=str(busy.pid))
    arguments = ("attach", "web", models.path / "bert", "--at", f"/of-{engine}", "--engine", engine)
    assert mountctl(*arguments, environment=environment).returncode == 0
    assert mountctl("detach", str(busy.pid), f"/of-{engine}").returncode == 0
    asked = (tmp_path / "log").read_text().split()
    assert (asked[1], asked[-2:]) == ("inspect", ["--", "web"])


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ("0", 13, "the container does not run"),
        ("many", 15, "'many' is not the number of a process"),
        ("", 13, "no container with name or ID"),
    ],
)
def test_what_a_stand_in_of_an_engine_answers_is_checked(
    answer: str, code: int, message: str, stand_ins: Callable[..., dict[str, str]], models: MountedStore
) -> None:
    arguments = ("attach", "web", models.path / "bert", "--engine", "docker")
    done = mountctl(*arguments, environment=stand_ins("docker", answer=answer))
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert message in done.stderr


def test_a_process_that_ends_leaves_nothing_mounted(models: MountedStore) -> None:
    with running("unshare", "--mount", "sleep", "300") as process:
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe").endswith("sleep"))
        assert mountctl("attach", str(process.pid), models.path / "bert", "--at", "/mnt").returncode == 0
        assert "/mnt " in "".join(mounts_of(process.pid))
    assert "/mnt " not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("end", ["\r", "\x0c", "\x1e", "\x85", "\u2028"])
def test_mounts_of_a_process_may_have_any_ends_of_lines_in_their_paths(
    end: str, models: MountedStore, tmp_path: Path
) -> None:
    (tmp_path / f"a{end}b").mkdir()
    command = f"mount -t tmpfs tmpfs '{tmp_path}/a{end}b' && exec sleep 300"
    with running("unshare", "--mount", "sh", "-c", command) as process:
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe").endswith("sleep"))
        done = mountctl("attach", str(process.pid), models.path / "bert", "--at", "/mnt")
        assert (done.returncode, done.stderr) == (0, "")
        assert mountctl("detach", str(process.pid), "/mnt/").returncode == 0
