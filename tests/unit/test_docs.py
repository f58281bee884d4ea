"""The documents say what is so."""

import ast
import re
from pathlib import Path

import pytest

from trimsfs.cli.mount_options import shown
from trimsfs.eviction_policies import NAMES
from trimsfs.exit_codes import EXIT_CODES
from trimsfs.options import FLAGS, MountOptions, declared_mountpoint, flag, load_options
from trimsfs.options.declaration import HEADINGS
from trimsfs.options.schema import DECLARATIONS, TABLES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("heading", HEADINGS)
def test_each_option_is_described_below_its_heading_as_it_is_spelled_and_with_its_default(heading: str) -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    section = re.split(rf"(?m)^## {heading}(?: \(experimental\))?$", page)[1].partition("\n## ")[0]
    table = section.partition("| option | default | |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[1:]]
    described = {name: row[1] for row in rows for name in re.findall(r"`([\w\[\]-]+)[^`]*`", row[0])}
    own = {name for name, declared in DECLARATIONS.items() if declared.heading == heading}
    spelled = {f"[[{TABLES[name]}]]" if name in TABLES else flag(name) if name in FLAGS else name: name for name in own}

    assert described.keys() == spelled.keys()
    for spelling, name in spelled.items():
        default = MountOptions.model_fields[name].default
        if default is not None and name not in {"eviction", *TABLES}:
            assert re.sub("[` ]", "", described[spelling]).startswith(shown(name, default)), spelling


def test_each_eviction_policy_is_described() -> None:
    table = (ROOT / "docs/configuration.md").read_text().partition("| policy | evicts |\n")[2].partition("\n\n")[0]

    assert re.findall(r"(?m)^\| `(\w+)` \|", table) == [*NAMES]


def test_every_exit_code_has_its_remedy() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()

    assert {code for code in EXIT_CODES.values() if f"| {code} |" not in text} == set()


def test_every_warning_and_error_in_the_log_has_its_remedy() -> None:
    section = (ROOT / "docs/troubleshooting.md").read_text().partition("## Log messages")[2]
    described = {text.strip() for text in re.findall(r"^\| `+(.+?)`+ \|", section, re.MULTILINE)}
    matched = {"REQUEST: ERROR: REASON"}
    for text in logged():
        words = re.split(r"%[sd]", text)
        if not re.search(r"\w", "".join(words)):
            continue  # only the text of an error
        found = {message for message in described if re.fullmatch(".+".join(map(re.escape, words)), message)}
        assert found, f"{text}: without a row"
        matched |= found

    assert len(described) > 50
    assert described - matched == set(), "nobody logs this any more"


def logged() -> set[str]:
    """The formats of all warnings and errors."""
    functions = {"log.warning", "log.error", "log.critical", "log.exception"}
    functions |= {"self._reporter.warning", "self._reporter.error", "reporter.warning", "reporter.error"}
    calls = [
        node
        for package in ("trimsfs", "mountctl")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in functions
    ]
    return {_format(call.args[0]).partition("\n")[0] for call in calls}


def _format(text: ast.expr) -> str:
    """A text with ``%s`` for what it says of the case."""
    if isinstance(text, ast.JoinedStr):
        return "".join("%s" if isinstance(part, ast.FormattedValue) else _format(part) for part in text.values)
    return str(ast.literal_eval(text))


def test_example_configuration_is_valid() -> None:
    options = load_options({}, configs=[ROOT / "packaging/config.toml"], environment={})

    assert (options.store, options.cache_dir) == (None, None)  # two mounts cannot have one cache directory
    assert options.cache_size == 500 << 30


def test_example_of_a_declared_mount_is_valid() -> None:
    file = ROOT / "packaging/mounts.d/models.toml"

    assert declared_mountpoint(file) == Path("/models")
    options = load_options({}, configs=[file], environment={})
    assert (options.access[0].path, options.tenants[0].host_size) == ("tenant-a", 20 << 30)


def test_the_readme_has_the_figures_of_performance() -> None:
    """Those that decide, in the first lines of either; a row of a table has a first load's ratios beside its times."""
    performance = (ROOT / "docs/performance.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in performance.splitlines() if line[:1] == "|"]
    told = {row[0]: row[-1].split("; ") for row in rows[:9]}
    (llama,) = (row[-2:] for row in rows if row[0] == "`llama`" and len(row) == 10)
    (distant,) = (row[-2:] for row in rows if row[0] == "`llama` at 25 ms")

    lines = (ROOT / "README.md").read_text().partition("## Try it")[0].replace("\n", " ").split("- **")[1:]
    figures = [re.findall(r"\d+(?= %)", line) for line in lines]
    over_https = {row[0]: row[-2:] for row in rows if len(row) == 7}
    beside = (
        over_https["Llama of 2.1 GB, first load and inference"],
        next(row[-2:] for row in rows if row[0] == "the same, beside four programs that compute"),
    )
    sooner = [f"{round(100 * (1 - float(ratio)))}" for s3fs, download in beside for ratio in (download, s3fs)]
    warm = float(told["a file of 1 GiB that is on the host, read"][0])
    assert told["first load of a 2.1 GB Llama, and one inference"] == llama
    assert told["the same, store at 25 ms"] == distant
    assert figures[:2] == [sooner, [f"{round(100 * warm)}"]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_named_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:trimsfs|tests|mountctl|packaging|docs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
