"""docs/kubernetes.md: each file, field, command, option and object that it names exists, and each step follows."""

import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import mountctl.commands.main
import trimsfs.cli.main
from mountctl.extras.csi import DRIVER_NAME
from mountctl.extras.csi.csi_requests import publication
from mountctl.extras.csi.tenants import check_tenant
from tests.csi.driver import persistent
from tests.csi.driver import publication as inline
from tests.kubernetes.manifests import (
    EXAMPLES,
    KUBERNETES,
    ROOT,
    Manifest,
    check_claim,
    every_document,
    examples,
    installed,
    of_kind,
)
from trimsfs.options import load_options

PAGE = (ROOT / "docs/kubernetes.md").read_text()
MOUNTS = Path("/var/lib/trimsfs/mounts")
TARGET = "/var/lib/kubelet/pods/p/mount"
PROGRAMS = {"trimsfs": trimsfs.cli.main.main, "mountctl": mountctl.commands.main.main}
KUBECTL = {"apply", "create", "delete", "describe", "exec", "get", "logs", "patch", "port-forward", "rollout"}


def blocks(kind: str) -> list[str]:
    """The code blocks of a kind."""
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def commands() -> list[str]:
    """The command lines of code blocks and of prose, without comments."""
    lines = [line for block in blocks("") for line in block.splitlines() if line.strip()]
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    quoted = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)]
    found = [*lines, *(text for text in quoted if re.match(r"(kubectl|make|mountctl|trimsfs) \S", text))]
    return [re.sub(r"\s+#.*", "", line) for line in found]


def documents() -> list[Manifest]:
    """The documents of the page's YAML."""
    return [each for block in blocks("yaml") for each in yaml.safe_load_all(block)]


def simple_commands() -> list[Any]:
    """Each program that a command line of the page runs, with its arguments."""
    parts = [part for line in commands() for part in re.split(r"&&|\||;|\$\(|\)", line)]
    found = [part.replace('"', "").split() for part in parts]
    programs = {*PROGRAMS, "kubectl", "make"}
    return [pytest.param(words, id=" ".join(words)[:60]) for words in found if words and words[0] in programs]


@pytest.mark.parametrize("words", simple_commands())
def test_each_command_exists_with_its_options(words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        (target,) = [word for word in arguments if "=" not in word]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "kubectl":
        verb = next(word for word in arguments if word in KUBECTL)
        assert verb
        if "--" in arguments:
            inner = arguments[arguments.index("--") + 1 :]
            if inner[0] != "cat":
                assert_understood(*inner)
    elif arguments and not arguments[0].startswith("-"):
        assert_understood(program, *arguments)


def assert_understood(program: str, *arguments: str) -> None:
    """Fail unless the program has this verb, and the verb these options."""
    group = PROGRAMS[program]
    command = group.get_command(click.Context(group), arguments[0])
    assert command is not None, arguments
    known = {option for parameter in command.params for option in parameter.opts}
    for word in arguments[1:]:
        assert not word.startswith("-") or word.partition("=")[0] in known, (arguments, word)


def test_each_object_that_a_command_names_is_installed() -> None:
    text = "\n".join(commands())
    named = set(re.findall(r"(daemonset)/([\w-]+)", text))
    there = {(each["kind"].lower(), each["metadata"]["name"]) for each in installed()}
    assert named <= there
    assert set(re.findall(r"-n (\S+)", text)) <= {each["metadata"]["name"] for each in installed()}
    containers = {
        container["name"]
        for each in installed()
        if each["kind"] == "DaemonSet"
        for container in each["spec"]["template"]["spec"]["containers"]
    }
    in_fleets = set(re.findall(r"- name: (nginx)\n", (EXAMPLES / "fleet/kustomization.yaml").read_text()))
    assert set(re.findall(r"-c (\S+)", text)) <= containers | in_fleets
    labels = {each["metadata"].get("labels", {}).get("app") for each in installed()}
    assert set(re.findall(r"-l app=(\S+)", text)) <= labels
    pods = {each["metadata"]["name"] for _, each in every_document() if each["kind"] == "Pod"}
    assert set(re.findall(r"kubectl logs ([\w-]+)", text)) <= pods


def test_the_secrets_of_the_page_are_those_that_containers_take() -> None:
    made = {
        name: set(re.findall(r"--from-(?:literal|file)=([\w.]+)", PAGE.partition(f" generic {name}")[2][:200]))
        for name in re.findall(r"create secret generic ([\w-]+)", PAGE)
    }
    taken = {str(path.relative_to(KUBERNETES)): path.read_text() for path in KUBERNETES.rglob("*.yaml")}
    assert "name: trimsfs-credentials" in taken["trimsfs.yaml"]
    for name, where in (("trimsfs-fleet", "fleet/kustomization.yaml"), ("trimsfs-metrics", "metrics/daemonset.yaml")):
        assert f"secretName: {name}" in taken[f"example/{where}"]
        paths = re.findall(rf"/etc/{name}/([\w.]+)", taken[f"example/{where}"])
        assert made.pop(name) == set(paths)
    assert made == {"trimsfs-credentials": set()}


def test_prometheus_finds_the_exporter() -> None:
    (configuration,) = (each["scrape_configs"] for each in documents() if "scrape_configs" in each)
    (job,) = configuration
    (exporter,) = examples()["metrics"]
    (port,) = exporter["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert job["relabel_configs"][0]["regex"] == f"{exporter['metadata']['labels']['app']};{port['name']}"
    assert f'job="{job["job_name"]}"' in (ROOT / "packaging/observability/alerts.yml").read_text()


def test_each_file_that_the_page_names_exists_and_each_file_is_named() -> None:
    for path in re.findall(r"packaging/[\w./-]+|tests/[\w./-]+\.py", PAGE):
        assert (ROOT / path.rstrip(".")).exists(), path
    for name in re.findall(r"`([\w/-]+\.yaml)`", PAGE):
        assert (KUBERNETES / name).exists() or (EXAMPLES / name).exists(), name
    rows = set(re.findall(r"^\| `([\w./-]+)` \|", PAGE, re.MULTILINE))
    assert examples().keys() <= rows
    own = {str(path.relative_to(KUBERNETES)) for path in KUBERNETES.glob("**/*.yaml") if EXAMPLES not in path.parents}
    assert own - {"kustomization.yaml"} <= rows


def test_all_digests_come_from_the_file_that_the_page_names() -> None:
    assert "image/kustomization.yaml" in PAGE
    for path in KUBERNETES.rglob("kustomization.yaml"):
        text = path.read_text()
        assert ("newName" in text) == (path == KUBERNETES / "image/kustomization.yaml"), path
        component = "kind: Component" in text  # gets its images where it is used
        assert component or re.search(r"^  - (\.\./\.\./)?image$", text, re.MULTILINE)


def test_volumes_of_the_page_are_what_the_driver_takes() -> None:
    (volume,) = (each for document in documents() for each in document.get("volumes", ()) if "csi" in each)
    assert volume["csi"]["driver"] == DRIVER_NAME
    request = inline(TARGET, "csi-1", volume["csi"]["volumeAttributes"])
    assert publication(request, MOUNTS).path == "resnet50"


def test_the_persistent_volume_and_the_claim_of_the_page_belong_together() -> None:
    volume, claim = (
        next(each for each in documents() if each.get("kind") == kind)
        for kind in ("PersistentVolume", "PersistentVolumeClaim")
    )
    source = volume["spec"]["csi"]
    assert source["driver"] == DRIVER_NAME
    request = persistent(TARGET, source["volumeHandle"], source["volumeAttributes"])
    assert publication(request, MOUNTS).path == "resnet50"
    check_claim(volume, claim)


def test_the_tenants_of_the_page_are_what_driver_and_server_take(tmp_path: Path) -> None:
    (tenants,) = (table for table in blocks("toml") if "[[tenant]]" in table)
    (tmp_path / "tenants.toml").write_text(tenants)
    check_tenant(tmp_path / "tenants.toml", "vision-2", "models", "public/resnet50")
    (table,) = (each for each in blocks("toml") if "[[tenants]]" in each)
    (tmp_path / "config.toml").write_text(table)
    (tenant,) = load_options({}, configs=[tmp_path / "config.toml"], environment={}).tenants
    assert str(tenant.web_identity_token_file) == "/run/trimsfs/tokens/team-a/reader"


def test_the_affinity_of_the_page_is_that_of_the_example() -> None:
    (affinity,) = (each["affinity"] for each in documents() if "affinity" in each)
    (deployment,) = [each for each in examples()["vllm.yaml"] if each["kind"] == "Deployment"]
    assert affinity == deployment["spec"]["template"]["spec"]["affinity"]


def test_the_first_steps_are_about_what_the_installation_has() -> None:
    assert of_kind("ConfigMap")["data"].keys() == {"config.toml", "tenants.toml"}
    limit = next(
        each["resources"]["limits"]["memory"]
        for each in of_kind("DaemonSet", "trimsfs")["spec"]["template"]["spec"]["containers"]
        if each["name"] == "server"
    )
    assert f"{limit.removesuffix('Gi')} GiB" in PAGE
