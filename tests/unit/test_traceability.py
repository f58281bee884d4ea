"""No claim of the documents is without a test."""

import re
from pathlib import Path

import pytest

from tests.traceability import (
    DOCUMENTS,
    PAGE,
    PROVED,
    anchor,
    claims_of,
    defined_tests,
    proofs,
    without_code,
    written,
)

WRITE = "run `.venv/bin/python -m tests.traceability`"


@pytest.mark.parametrize("document", PROVED)
def test_every_claim_has_a_title_of_its_own_and_tests(document: str) -> None:
    titles = [claim.title for claim in claims_of(text_of(document))]
    tests = proofs()[document]

    assert len(titles) > 20
    assert "" not in titles, "a claim has no title"
    assert len(titles) == len(set(titles))
    assert set(titles) - set(tests) == set(), "claims without a test"
    assert set(tests) - set(titles) == set(), "tests without a claim"
    assert [title for title, names in tests.items() if not names or len(names) != len(set(names))] == []


def test_every_test_of_a_claim_exists() -> None:
    assert set(proofs()) == set(PROVED)
    named = {name for document in proofs().values() for names in document.values() for name in names}

    assert len(named) > 200
    assert named - set(defined_tests()) == set()


@pytest.mark.parametrize("document", PROVED)
def test_names_of_tests_are_in_the_table_alone(document: str) -> None:
    assert re.findall(r"`test_\w+`", text_of(document)) == []


def test_the_table_is_what_the_program_writes() -> None:
    assert PAGE.read_text() == written(), WRITE


@pytest.mark.parametrize("document", sorted(DOCUMENTS.glob("*.md")), ids=lambda path: path.stem)
def test_links_to_headings_lead_to_one(document: Path) -> None:
    for target, fragment in re.findall(r"\]\(((?!https?:)[^)#]*)#([^)]+)\)", document.read_text()):
        page = document.parent / target if target else document
        headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
        assert fragment in map(anchor, headings), f"{target}#{fragment}"


def text_of(document: str) -> str:
    """A document whose claims have tests."""
    return (DOCUMENTS / f"{document}.md").read_text()
