"""Which tests prove which claim of the documents: ``python -m tests.traceability`` writes docs/traceability.md.

A claim is a point of a document that begins with a title in bold. ``claims.toml`` has the tests of each.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = ROOT / "docs"
PAGE = DOCUMENTS / "traceability.md"
PROVED = ("semantics", "security", "reliability")
"""The documents whose claims have tests."""
NO_CLAIMS = {"Not promised", "Not protected", "Limits of these tests"}
"""Sections of them that claim nothing."""

HEAD = """\
# Traceability

```
make test-all ARGS='-k NAME'                # runs a test by its name
.venv/bin/python -m tests.traceability      # writes this page from tests/claims.toml
```

{claims} claims of {documents}
have {tests} tests that prove them. `make test` checks that no claim lacks a test and that all tests exist.
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim and the heading that it is below. The title is empty where the document gives none."""

    title: str
    heading: str


def claims_of(text: str) -> list[Claim]:
    """The claims of a document, in its order."""
    found, section, heading = [], "", ""
    for line in without_code(text).splitlines():
        if match := re.match(r"(#+) (.+)", line):
            heading = match[2]
            section = heading if len(match[1]) <= 2 else section
        elif line.startswith("- ") and section not in NO_CLAIMS:
            title = re.match(r"- \*\*(.+?)\.?\*\*", line)
            found.append(Claim(title[1] if title else "", heading))
    return found


@cache
def proofs() -> dict[str, dict[str, list[str]]]:
    """By document and title, the names of the tests, as ``claims.toml`` has them."""
    found: dict[str, dict[str, list[str]]] = tomllib.loads((ROOT / "tests/claims.toml").read_text())
    return found


@cache
def defined_tests() -> Mapping[str, Sequence[Path]]:
    """The files that define a test of each name."""
    found = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE):
            found[name].append(path.relative_to(ROOT))
    return found


def without_code(text: str) -> str:
    """A document without its blocks of code, whose comments look like headings."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The fragment by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def written() -> str:
    """All of docs/traceability.md."""
    claims = {document: claims_of((DOCUMENTS / f"{document}.md").read_text()) for document in PROVED}
    links = [f"[{document.capitalize()}]({document}.md)" for document in PROVED]
    head = HEAD.format(
        documents=f"{', '.join(links[:-1])} and {links[-1]}",
        claims=sum(map(len, claims.values())),
        tests=len({name for document in proofs().values() for names in document.values() for name in names}),
    )
    tables = ("\n".join(_table(document, claims[document])) for document in PROVED)
    return "\n".join([head, *tables])


def _table(document: str, claims: Sequence[Claim]) -> Iterator[str]:
    tests = proofs().get(document, {})
    yield from (f"## {document.capitalize()}", "", "| claim | tests |", "|---|---|")
    for claim in claims:
        names = tests.get(claim.title, ())
        links = (f"[`{name}`](../{path})" for name in names for path in defined_tests().get(name, ()))
        yield f"| [{claim.title}]({document}.md#{anchor(claim.heading)}) | {'<br>'.join(links)} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(written())
