"""Which namespaces may have what."""

from pathlib import Path

import pytest

from mountctl.extras.csi.status_errors import StatusError
from mountctl.extras.csi.tenants import TenantsError, check_tenant, read_tenants

RULES = """
[[tenant]]
namespaces = ["vision", "vision-*"]
mount = "models"
paths = ["vision", "public/resnet50"]

[[tenant]]
namespaces = ["admin"]
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "tenants.toml"
    file.write_text(RULES)
    return file


@pytest.mark.parametrize(
    ("namespace", "mount", "path", "allowed"),
    [
        ("vision", "models", "vision", True),
        ("vision", "models", "vision/a/b", True),
        ("vision-2", "models", "public/resnet50", True),
        ("vision", "models", "vision2", False),
        ("vision", "models", "visio", False),
        ("vision", "models", "public", False),
        ("vision", "models", "public/resnet5", False),
        ("vision", "models", "", False),
        ("vision", "other", "vision", False),
        ("vision2", "models", "vision", False),
        ("Vision", "models", "vision", False),
        ("my-vision", "models", "vision", False),
        ("admin", "models", "", True),
        ("admin", "other", "anything/below", True),
        ("default", "models", "vision", False),
        (None, "models", "vision", False),
    ],
)
def test_a_namespace_has_what_an_entry_allows(
    namespace: str | None, mount: str, path: str, allowed: bool, rules: Path
) -> None:
    check_tenant(None, namespace, mount, path)  # without a file, all have all
    if allowed:
        check_tenant(rules, namespace, mount, path)
    else:
        with pytest.raises(StatusError):
            check_tenant(rules, namespace, mount, path)


def test_an_empty_file_allows_nothing(rules: Path) -> None:
    rules.write_text("")
    with pytest.raises(StatusError, match="may not use all of mount models"):
        check_tenant(rules, "admin", "models", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tenant", "not valid TOML"),
        ("[[tenants]]", "tenants"),
        ("[[tenant]]", "namespaces"),
        ("[[tenant]]\nnamespaces = []", "namespaces"),
        ('[[tenant]]\nnamespaces = "all"', "namespaces"),
        ('[[tenant]]\nnamespaces = ["a"]\npath = "b"', "path"),
        ('[[tenant]]\nnamespaces = ["a"]\npaths = []', "paths"),
        ('[[tenant]]\nnamespaces = ["a"]\npaths = [""]', "leave paths out"),
        ('[[tenant]]\nnamespaces = ["a"]\npaths = ["/b"]', "relative"),
        ('[[tenant]]\nnamespaces = ["a"]\npaths = ["b/"]', "relative"),
        ('[[tenant]]\nnamespaces = ["a"]\npaths = ["../b"]', "relative"),
    ],
)
def test_what_is_not_understood_allows_nothing_and_says_where(text: str, words: str, rules: Path) -> None:
    rules.write_text(text)
    with pytest.raises(TenantsError) as caught:
        read_tenants(rules)
    message = str(caught.value)
    assert (message.startswith(f"{rules}: "), words in message, "\n" in message) == (True, True, False), message
    with pytest.raises(StatusError, match="tenants"):
        check_tenant(rules, "a", "models", "b")


def test_a_file_that_is_gone_allows_nothing(tmp_path: Path) -> None:
    with pytest.raises(StatusError, match="No such file"):
        check_tenant(tmp_path / "none.toml", "a", "models", "b")
