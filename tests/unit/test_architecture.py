"""docs/architecture.md and docs/glossary.md describe the tree."""

import ast
import re
from pathlib import Path

from tests.support.ranks import RANKS

ROOT = Path(__file__).parents[2]


def rows(heading: str, page: str = "docs/architecture.md") -> list[list[str]]:
    """The cells of the tables below a heading of a page, without their heads."""
    section = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    heads = {number - 1 for number, row in enumerate(cells) if set(row) == {"---"}}
    return [row for number, row in enumerate(cells) if number not in heads and set(row) != {"---"}]


def modules() -> list[Path]:
    """The modules and packages of both programs, but for what users never name and what protoc writes."""
    found = [path for program in ("trimsfs", "mountctl") for path in sorted((ROOT / program).rglob("*.py"))]
    return [path for path in found if path.stem not in {"__main__", "csi_pb2", "sitecustomize"}]


def test_the_map_has_every_package() -> None:
    described = {}
    for package in (path.parent for path in modules() if path.stem == "__init__"):
        first = (ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or "").split("\n\n")[0]
        described[f"`{package.relative_to(ROOT)}/`"] = " ".join(first.replace("``", "`").split())
    assert {package: owns for package, owns in rows("Map")} == described  # noqa: C416 - rows are lists


def test_the_map_is_in_the_order_in_which_a_read_passes_through_it() -> None:
    rooms = [package.strip("`/").split("/") for package, _ in rows("Map")]
    order = list(dict.fromkeys(parts[1] for parts in rooms if parts[0] == "trimsfs" and len(parts) > 1))
    core = [sorted(rank) for rank in RANKS["trimsfs"] if rank != {"extras"}]
    assert order == [*(name for rank in core for name in rank), "extras"]


def test_modules_stay_below_the_limit_that_contributors_are_told() -> None:
    limit = re.search(r"^- Modules stay under (\d+) lines", (ROOT / "docs/contributing.md").read_text(), re.MULTILINE)
    assert limit is not None
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in modules()}
    assert {path: length for path, length in lengths.items() if length >= int(limit[1])} == {}


def singular(term: str) -> str:
    """A term as the table has it."""
    for plural, one in (("ies", "y"), ("ches", "ch"), ("sses", "ss"), ("ss", "ss"), ("s", "")):
        if term.endswith(plural):
            return term.removesuffix(plural) + one
    return term


def test_every_term_that_a_module_is_named_after_has_its_one_meaning() -> None:
    words = [*rows("Terms", "docs/glossary.md"), *rows("Names in the code", "docs/glossary.md")]
    terms = [singular(term.lower()) for names, _ in words for term in names.split(", ")]
    named = {(path.parent.name if path.stem == "__init__" else path.stem).replace("_", " ") for path in modules()}

    def known(name: str) -> bool:
        """Whether a name is a term, or is made of terms."""
        words = name.split()
        parts = [(" ".join(words[:place]), " ".join(words[place:])) for place in range(1, len(words))]
        return singular(name) in terms or any(singular(first) in terms and known(rest) for first, rest in parts)

    assert len(terms) == len(set(terms))
    assert {name for name in named if not known(name)} == set()
