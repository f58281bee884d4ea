"""Labels of nodes: valid by Kubernetes' rules for whatever a model is called, bounded, and none of them stale."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kubernetes.api_server import merged
from trimsfs.errors import ConfigurationError
from trimsfs.extras.kubernetes.node import check_prefix, label_key, labels, patch

PREFIX = "warm.trimsfs.dev"
# As k8s.io/apimachinery/pkg/util/validation has them.
QUALIFIED_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")

names = st.text(min_size=1, max_size=300).map(lambda text: text.replace("\0", "x")) | st.from_regex(
    r"[A-Za-z0-9._/ -]{1,90}", fullmatch=True
)


def is_key(key: str) -> bool:
    """Whether Kubernetes takes a label's key."""
    prefix, _, name = key.partition("/")
    return bool(
        len(prefix) <= 253 and SUBDOMAIN.fullmatch(prefix) and len(name) <= 63 and QUALIFIED_NAME.fullmatch(name)
    )


@given(names)
@example("a" * 64)
@example("a" * 63)
@example("-")
@example("...")
@example("meta-llama/Llama-3.1-8B")
@example("modèle")
@example("名前")
@example("\udc80\udcff")
@example("a\n")
@example("_a_")
def test_the_key_of_any_model_is_valid(model: str) -> None:
    assert is_key(label_key(PREFIX, model))


@pytest.mark.parametrize("model", ["llama", "Llama-3.1_8B.gguf", "a", "a" * 63])
def test_a_valid_name_is_its_own_key(model: str) -> None:
    assert label_key(PREFIX, model) == f"{PREFIX}/{model}"


@given(st.lists(names, unique=True, min_size=2, max_size=20))
def test_two_models_have_two_keys(models: list[str]) -> None:
    assert len({label_key(PREFIX, model) for model in models}) == len(models)


@given(st.dictionaries(names, st.floats(0, 1)))
def test_values_are_percents_in_tens(shares: dict[str, float]) -> None:
    found = labels(PREFIX, shares)
    assert all(VALUE.fullmatch(value) and 0 < int(value) <= 100 and int(value) % 10 == 0 for value in found.values())
    assert found.keys() == {label_key(PREFIX, model) for model, share in shares.items() if share >= 0.1}


def test_only_a_whole_model_has_a_hundred() -> None:
    assert labels(PREFIX, {"whole": 1.0, "almost": 0.999, "a third": 1 / 3, "hardly": 0.099}) == {
        f"{PREFIX}/whole": "100",
        f"{PREFIX}/almost": "90",
        label_key(PREFIX, "a third"): "30",
    }


keys = st.sampled_from([f"{PREFIX}/{name}" for name in "abcd"])
tens = st.sampled_from(["10", "50", "100"])
other = st.dictionaries(
    st.sampled_from(["kubernetes.io/hostname", "zone", f"{PREFIX}x/a", f"other.{PREFIX}/a", "warm"]),
    st.text(max_size=5),
)


@given(other, st.dictionaries(keys, tens), st.dictionaries(keys, tens))
def test_a_patch_leaves_these_labels_of_the_prefix_and_all_others(
    others: dict[str, str], before: dict[str, str], wanted: dict[str, str]
) -> None:
    node = {"metadata": {"name": "n", "labels": others | before}, "spec": {"unschedulable": True}}
    change = patch(PREFIX, others | before, wanted)
    after = merged(node, change)
    assert after == {**node, "metadata": {"name": "n", "labels": others | wanted}}
    assert (change == {}) == (before == wanted)


@pytest.mark.parametrize("prefix", ["", "-a", "a_b", "A", "a..b", "a/b", "a" * 254, "a.b\n"])
def test_an_invalid_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="--prefix"):
        check_prefix(prefix)
