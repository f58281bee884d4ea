"""Models that a container's annotations ask for, mounted by the hook of an OCI runtime."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mountctl.containers import mountpoints
from mountctl.containers.hook import STATE_LIMIT, parse_models, parse_state
from tests.containers.engines import SUB_IDS, Podman, Users, bundle, packaged, run_bundle
from tests.containers.host import Host
from tests.support.messages import json_values
from tests.support.mounts import MOUNTCTL, MountedStore
from trimsfs.errors import ConfigurationError, TrimsError
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, Mount

STATE = {"ociVersion": "1.0.2", "id": "x", "status": "created", "pid": 4242, "bundle": "/nonexistent"}


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_a_bundle_gets_the_models_of_its_annotations(
    runtime: str, users: Users, own_root: Path, models: MountedStore, host: Host, tmp_path: Path
) -> None:
    if users.namespace:
        for path in (own_root, *own_root.rglob("*")):  # as engines have it
            os.chown(path, SUB_IDS, SUB_IDS, follow_symlinks=False)
    script = f"cd {models.path}; sha256sum resnet50/params /opt/bert/params; grep trimsfs /proc/self/mountinfo"
    wanted = packaged("config-snippet.json")["annotations"]["dev.trimsfs.models"]
    done = run_bundle(runtime, bundle(tmp_path, own_root, script, users, models=wanted, mount=models.path))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    first, second, *lines = done.stdout.splitlines()
    assert first.split()[0] == host.digest("resnet50/params")
    assert second.split()[0] == host.digest("bert/params")
    assert len(lines) == 2
    assert all({"ro", "nosuid", "nodev"} <= set(line.split()[5].split(",")) for line in lines)
    assert str(own_root) not in Path("/proc/self/mountinfo").read_text()


def test_podman_runs_the_hook_where_there_is_the_annotation(
    podman: Podman, hooks: Path, models: MountedStore, host: Host, users: Users
) -> None:
    path = "/opt/bert/params"
    for annotations in ([f"dev.trimsfs.mount={models.path}", "dev.trimsfs.models=bert=/opt/bert"], []):
        options = [*users.podman, *(f"--annotation={annotation}" for annotation in annotations)]
        done = podman(
            *(f"--hooks-dir={hooks}", "run", "--rm", *options, podman.image),
            *("sh", "-c", f"[ ! -e {path} ] || sha256sum {path}"),
        )
        assert done.returncode == 0, done.stderr
        expected = host.digest("bert/params")
        assert done.stdout == (f"{expected}  {path}\n" if annotations else "")


@pytest.mark.parametrize(("number", "rest"), [(5, ""), (7, " and 2 more")])
def test_who_must_choose_among_mounts_is_told_how_and_of_how_many(
    number: int, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        Mount(
            number=each, parent=1, mountpoint=Path(f"/m{each}"), device=f"0:{each}", kind=FILE_SYSTEM_TYPE, source="s"
        )
        for each in range(number)
    ]
    monkeypatch.setattr(mountpoints, "file_systems", lambda: found)
    with pytest.raises(ConfigurationError) as raised:
        mountpoints.mountpoint_of(None, remedy="set annotation dev.trimsfs.mount of the container to")
    remedy = "set annotation dev.trimsfs.mount of the container to one of /m0, /m1, /m2, /m3, /m4"
    assert str(raised.value) == f"there are {number} trimsfs mounts: {remedy}{rest}"


@pytest.mark.parametrize(
    ("wanted", "mount", "message"),
    [
        ("../../etc", "MODELS", "'../../etc' is not a model"),
        ("bert/../../../etc=/opt/x", "MODELS", "'bert/../../../etc' is not a model"),
        ("/etc", "MODELS", "'/etc' is not a model"),
        (".trims=/opt/x", "MODELS", "'.trims' is not a model"),
        ("bert/.trims/params=/opt/x", "MODELS", "'bert/.trims/params' is not a model"),
        ("bert=/../../../../../OUTSIDE/x", "MODELS", "without . and .."),
        ("bert=opt", "MODELS", "'opt' is not an absolute path"),
        ("bert=/link/x", "MODELS", "/link/x: leads through a symbolic link"),
        ("bert=/link", "MODELS", "/link: leads through a symbolic link"),
        ("bert=/proc", "MODELS", "/proc: lies on a kernel file system"),
        ("bert=/proc/self/attr", "MODELS", "/proc/self/attr: "),
        ("bert=/", "MODELS", "'/': not a path in a container"),
        ("none", "MODELS", "MODELS/none: does not exist: see `trimsfs ls`"),
        ("", "MODELS", "'' is not a model"),
        ("bert,,resnet50", "MODELS", "'' is not a model"),
        ("bert\nx", "MODELS", r"MODELS/bert\nx: does not exist: see `trimsfs ls`"),
        ("bert=/opt,resnet50=/opt", "MODELS", "/opt: a model is already mounted there"),
        ("bert=/opt/x", "/etc", "/etc: no trimsfs mount"),
        ("params=/opt/x", "MODELS/bert", "MODELS/params: does not exist: see `trimsfs ls`"),
        ("bert=/opt/x", "MODELS/../../..", "no trimsfs mount"),
    ],
)
def test_hostile_annotations_are_refused(
    wanted: str,
    mount: str,
    message: str,
    own_root: Path,
    models: MountedStore,
    host: Host,
    outside: Path,
    tmp_path: Path,
) -> None:
    (own_root / "link").symlink_to("../" * 20 + str(outside))

    def filled(text: str) -> str:
        return text.replace("OUTSIDE", str(outside)).replace("MODELS", str(models.path))

    # Two runtimes, of which crun tells only the exit code of a hook unless it is given a place for the rest.
    runtime, log = "crun" if len(wanted) % 2 else "runc", tmp_path / "hook.log"
    made = bundle(tmp_path, own_root, "echo started", models=filled(wanted), mount=filled(mount), log=log)
    done = run_bundle(runtime, made)
    assert done.returncode != 0
    assert done.stdout == ""
    said = done.stderr + (log.read_text() if runtime == "crun" else "")
    assert "mountctl: " in said
    assert filled(message) in said.replace("\\\\", "\\")  # a runtime escapes what it logs once more
    of_models = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(host.store) in line]
    assert len(of_models) == 1


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_a_stage_that_does_not_tell_the_process_is_refused(
    runtime: str, own_root: Path, models: MountedStore, tmp_path: Path
) -> None:
    log = tmp_path / "hook.log"
    made = bundle(tmp_path, own_root, "echo started", models="bert=/opt", mount=models.path, log=log)
    settings = json.loads((made / "config.json").read_text())
    settings["hooks"] = {"createContainer": settings["hooks"]["createRuntime"]}
    (made / "config.json").write_text(json.dumps(settings))
    done = run_bundle(runtime, made)
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert "stage createRuntime" in done.stderr + (log.read_text() if runtime == "crun" else "")


@pytest.mark.parametrize("gpu", [None, "false"])
def test_a_container_that_asks_for_nothing_is_left_alone(gpu: str | None, own_root: Path, tmp_path: Path) -> None:
    done = run_bundle("crun", bundle(tmp_path, own_root, "echo started", gpu=gpu))
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b" " * (STATE_LIMIT + 2), "more than"),
        (json.dumps(STATE | {"pid": 1}).encode(), "stage createRuntime"),
        (json.dumps(STATE | {"pid": "4242"}).encode(), "stage createRuntime"),
        (json.dumps(STATE | {"pid": True}).encode(), "stage createRuntime"),
        (json.dumps(STATE | {"status": "running"}).encode(), "stage createRuntime"),
        (json.dumps(STATE | {"bundle": "x"}).encode(), "not an absolute path"),
        (json.dumps(STATE | {"pid": 1 << 40}).encode(), "stage createRuntime"),
        (json.dumps(STATE | {"status": []}).encode(), "stage createRuntime"),
        (json.dumps(STATE | {"bundle": "/\0"}).encode(), "not an absolute path"),
        (json.dumps(STATE | {"bundle": "/\ud800"}).encode(), "not an absolute path"),
        (json.dumps(STATE | {"annotations": ["x"]}).encode(), "annotations"),
        (json.dumps(STATE | {"annotations": {"dev.trimsfs.models": 7}}).encode(), "annotation dev.trimsfs.models"),
        (json.dumps(STATE | {"annotations": {"dev.trimsfs.models": "a\0"}}).encode(), "annotation dev.trimsfs.models"),
        (json.dumps(STATE | {"annotations": {"dev.trimsfs.mount": "/\0"}}).encode(), "annotation dev.trimsfs.mount"),
    ],
)
def test_a_state_that_cannot_be_right_gives_one_line(text: bytes, message: str) -> None:
    done = subprocess.run([MOUNTCTL, "oci-hook"], input=text, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr
    assert message in done.stderr.decode()


values = json_values | st.sampled_from(["/x", "x", "created"])
states = st.dictionaries(st.sampled_from(["pid", "bundle", "status", "annotations"]), values)


@given(st.binary(max_size=50) | states.map(lambda state: json.dumps(STATE | state).encode()))
def test_any_state_is_parsed_or_refused(text: bytes) -> None:
    try:
        state = parse_state(text)
    except TrimsError:
        return
    assert state.pid > 1
    assert state.bundle.is_absolute()


@given(st.text(max_size=40) | st.text("ab/.=,", max_size=20))
@example("a/./b")
@example("a=/x,a=/x")
def test_no_model_leads_out_of_the_mount(text: str) -> None:
    try:
        models = parse_models(text)
    except ConfigurationError:
        return
    assert models
    for name, target in models:
        assert os.path.normpath(os.path.join("/m", name)) == f"/m/{name}"
        assert target is None or target.startswith("/")
