"""The manifests against published schemas: Kubernetes' own, and what KServe's package has of its."""

import copy
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.kubernetes import kserve_schema
from tests.kubernetes.manifests import (
    EXAMPLES,
    KUBERNETES,
    NEWEST,
    OLDEST,
    Manifest,
    every_document,
    examples,
    installed,
    pod_specs,
)

KSERVE = "serving.kserve.io/"


def own_documents() -> list[Any]:
    return [pytest.param(each, id=name) for name, each in every_document() if KSERVE not in each["apiVersion"]]


def kserve_documents() -> list[Any]:
    return [pytest.param(each, id=name) for name, each in every_document() if KSERVE in each["apiVersion"]]


@pytest.mark.parametrize("document", own_documents())
def test_each_document_is_valid_for_the_oldest_and_the_newest_kubernetes(document: Manifest) -> None:
    for version in (OLDEST, NEWEST):
        assert kubernetes_validate.validate(document, version, strict=True) == ".".join(version.split(".")[:2])


@pytest.mark.parametrize("document", kserve_documents())
def test_each_document_of_kserve_is_valid(document: Manifest) -> None:
    kserve_schema.check(document)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("ClusterStorageContainer", "spec.workloadTypes", "initContainer"),
        ("ClusterStorageContainer", "spec.container.volumeMount", []),
        ("ClusterStorageContainer", "spec.supportedUriFormats", "trimsfs://"),
        ("InferenceService", "spec.predictor.model.storageURI", "pvc://a"),
        ("InferenceService", "spec.predictor.model.volumeMounts", [{"name": "a"}]),
    ],
)
def test_the_check_of_kserve_finds_what_is_wrong(kind: str, field: str, value: object) -> None:
    document = copy.deepcopy(next(each for _, each in every_document() if each["kind"] == kind))
    *above, last = field.split(".")
    inner = document
    for name in above:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(kserve_schema.SchemaError):
        kserve_schema.check(document)


def test_all_files_are_used() -> None:
    used = {"kustomization.yaml", "image/kustomization.yaml"}
    for directory in (KUBERNETES, *(path.parent for path in EXAMPLES.glob("*/kustomization.yaml"))):
        kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
        names = ["kustomization.yaml", *kustomization["resources"]]
        used |= {str((directory / name).relative_to(KUBERNETES)) for name in names}
    used |= {str(path.relative_to(KUBERNETES)) for path in EXAMPLES.glob("*.yaml")}
    assert {str(path.relative_to(KUBERNETES)) for path in KUBERNETES.rglob("*.yaml")} == used
    assert set(examples()) == {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.iterdir()}


def test_no_object_is_defined_twice() -> None:
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in installed()]
    assert len(names) == len(set(names))


def test_images_have_digests_and_those_of_examples_versions() -> None:
    digest = re.compile(r"[a-z0-9./-]+(:v[0-9.]+)?@sha256:[0-9a-f]{64}")
    for name, spec in pod_specs():
        for each in spec["containers"]:
            image = each["image"]
            if name.startswith(":") or "trimsfs" in image:
                assert digest.fullmatch(image), (name, image)
            else:
                assert re.search(r":[\w.-]*\d", image), (name, image)
            assert "imagePullPolicy" not in each  # a digest needs no other


def test_every_container_has_requests_and_a_limit_of_memory() -> None:
    for name, spec in pod_specs():
        for each in spec["containers"]:
            if name.startswith(":") or "trimsfs" in each["image"]:
                resources = each["resources"]
                assert {"cpu", "memory"} <= resources["requests"].keys(), name
                assert "memory" in resources["limits"], name
                assert "cpu" not in resources["limits"], name  # throttled, it would keep readers waiting
