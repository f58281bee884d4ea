"""The documentation as a site: every page, in the README's order, every link, and nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: strictly, so that each warning is an error."""
    directory = tmp_path_factory.mktemp("site")
    command = [str(Path(sys.executable).with_name("mkdocs")), "build", "--site-dir", str(directory)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def test_each_page_is_there_and_the_readme_is_the_first(site: Path) -> None:
    assert {path.stem for path in site.glob("*.html")} == {
        "404",
        "index",
        *(document.stem for document in DOCUMENTS[1:]),
    }
    assert "Mount a bucket of models" in (site / "index.html").read_text()


def test_the_navigation_is_that_of_the_readme(site: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## Documentation")[2].partition("\n## ")[0]
    groups = {line.partition(": ")[0]: line for line in section.replace("\n  ", " ").split("\n- ")[1:]}
    wanted = {title: re.findall(r"\[([^]]+)\]\(docs/(\w+)\.md\)", line) for title, line in groups.items()}

    found: dict[str, list[tuple[str, str]]] = {}
    for line in (ROOT / "mkdocs.yml").read_text().partition("nav:")[2].partition("validation:")[0].splitlines():
        group = re.fullmatch(r"  - (\w+):", line)
        page = re.fullmatch(r"      - ([^:]+): (\w+)\.md", line)
        if group:
            found[group[1]] = []
        elif page:
            [*found.values()][-1].append((page[1], page[2]))
    assert found == wanted


def test_nothing_comes_from_other_hosts(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(
            r"<(?:link|script|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>", page.read_text()
        )
        assert loaded == [], page.name
        assert 'class="mermaid"' not in page.read_text(), "which loads a script"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text()), sheet.name


def test_lists_in_lists_and_tables_are_made(site: Path) -> None:
    text = (site / "contributing.html").read_text()
    assert re.search(r"<ul>\s*<li><code>make reliability</code> prints a table", text)
    for document in DOCUMENTS:
        lines = re.sub(r"(?ms)^```.*?^```", "", document.read_text()).splitlines()
        tables = sum(bool(re.match(r"\| ?:?-", line)) for line in lines)
        name = "index" if document.name == "README.md" else document.stem
        assert (site / f"{name}.html").read_text().count("<table") == tables, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_headings_lead_there_on_github_too(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", document.read_text()):
        linked = (document.parent / target).read_text() if target else document.read_text()
        headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", linked))
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
