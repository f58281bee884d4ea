"""The admission policy of the sidecar for labels, evaluated as the API server would: its own node, its own labels.

The implementation of CEL is not that of Kubernetes.
"""

from typing import Any

import cel
import pytest

from tests.kubernetes.manifests import Manifest, examples
from trimsfs.extras.kubernetes.node_labels import PREFIX

SIDECAR = "system:serviceaccount:trimsfs:trimsfs-node-labels"
NODE_NAME = "authentication.kubernetes.io/node-name"
WARM = f"{PREFIX}/llama"
OWNER = {"apiVersion": "v1", "kind": "ConfigMap", "name": "a", "uid": "1"}


def policy() -> Manifest:
    """The policy of the example."""
    (found,) = [each for each in examples()["node-labels"] if each["kind"] == "ValidatingAdmissionPolicy"]
    spec: Manifest = found["spec"]
    assert spec["failurePolicy"] == "Fail"
    return spec


def node(name: str = "n1", spec: Manifest | None = None, **metadata: Any) -> Manifest:
    """A node with this metadata and a specification."""
    return {"metadata": {"name": name, **metadata}, "spec": spec or {}}


def admitted(before: Manifest, after: Manifest, user: str = SIDECAR, extra: Any = None) -> bool:
    """Whether the policy admits a change; an expression that fails refuses it."""
    told = {NODE_NAME: ["n1"]} if extra is None else extra
    context: Manifest = {
        "object": after,
        "oldObject": before,
        "request": {"userInfo": {"username": user, "extra": told}},
    }
    if not all(cel.evaluate(each["expression"], context) for each in policy()["matchConditions"]):
        return True
    variables = {each["name"]: cel.evaluate(each["expression"], context) for each in policy()["variables"]}
    context["variables"] = variables
    try:
        found = [cel.evaluate(each["expression"], context) for each in policy()["validations"]]
    except (RuntimeError, KeyError, ValueError):
        return False
    return all(each is True for each in found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (node(labels={"zone": "a"}), node(labels={"zone": "a", WARM: "10"})),
        (node(labels={"zone": "a", WARM: "10"}), node(labels={"zone": "a"})),
        (node(labels={WARM: "10"}, annotations={"a": "b"}), node(labels={WARM: "20"}, annotations={"a": "b"})),
        (
            node(finalizers=["a/b"], ownerReferences=[OWNER]),
            node(labels={WARM: "1"}, finalizers=["a/b"], ownerReferences=[OWNER]),
        ),
        (node(), node(labels={WARM: "10"})),
    ],
    ids=["adds", "removes", "changes", "beside other metadata", "first"],
)
def test_it_may_change_its_own_labels_of_its_own_node(before: Manifest, after: Manifest) -> None:
    assert admitted(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (node(labels={"zone": "a"}), node(labels={"zone": "b"})),
        (node(labels={"zone": "a"}), node()),
        (node(labels={}), node(labels={"role": "control-plane"})),
        (node(labels={}), node(labels={f"{PREFIX}.other/a": "1"})),
        (node(), node(spec={"taints": []})),
        (node(), node(annotations={"a": "b"})),
        (node(), node(finalizers=["a/b"])),
        (node(finalizers=["a/b"]), node()),
        (node(), node(ownerReferences=[OWNER])),
        (node(ownerReferences=[OWNER]), node(ownerReferences=[OWNER | {"uid": "2"}])),
        (node("n2"), node("n2", labels={WARM: "10"})),
    ],
    ids=[
        "changes",
        "removes",
        "adds",
        "similar prefix",
        "spec",
        "annotation",
        "adds finalizer",
        "removes finalizer",
        "adds owner",
        "changes owner",
        "other node",
    ],
)
def test_it_may_change_nothing_else(before: Manifest, after: Manifest) -> None:
    assert not admitted(before, after)
    assert admitted(before, after, user="system:node:n1")  # the policy is for nobody else


def test_a_token_that_is_of_no_node_may_change_none() -> None:
    assert not admitted(node(), node(labels={WARM: "10"}), extra={})
