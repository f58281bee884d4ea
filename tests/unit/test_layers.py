"""Which module may import what: every import runs down the list of ranks."""

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trimsfs
from tests.support.ranks import RANKS

ROOT = Path(trimsfs.__file__).parent.parent
ENTRY_POINTS = {"trimsfs", "trimsfs.__main__", "trimsfs.daemon", "mountctl"}
"""What is started, or imported by users: above all."""
KNOWN_TO_MOUNTCTL = {
    "trimsfs",
    "trimsfs.command_group",
    "trimsfs.errors",
    "trimsfs.exit_codes",
    "trimsfs.listen_address",
    "trimsfs.mountinfo",
    "trimsfs.options",
    "trimsfs.plugins",
    "trimsfs.polling",
    "trimsfs.processes",
    "trimsfs.text",
}
PLUGGED = {"trimsfs.extras": {"trimsfs.plugins"}, "mountctl.extras": {"mountctl.commands.main"}}
"""The tables of extras, and who of the core reads each by its name."""
MOST_AT_ROOT, MOST_IN_PACKAGE = 17, 15
"""Modules at a program's root, and in any package, beside ``__init__``."""
PURE = [
    "trimsfs.concurrency.adaptive_limit",
    "trimsfs.errors",
    "trimsfs.options",
    "trimsfs.prefetch.directory_readahead",
    "trimsfs.tiers.ranges",
    "trimsfs.text",
    "trimsfs.eviction_policies",
    "trimsfs.types",
]


def sources(package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names; a package is named for its ``__init__``."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = {**sources("trimsfs"), **sources("mountctl")}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """The dotted names that a file imports, anywhere in it; of ``from a import b`` both a and a.b.

    A string that is the name of a module counts too, also with an attribute (``MODULE:ATTRIBUTE``), as ``importlib``
    may import it. Programs that are started by their names are not imported.
    """
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in _run(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if name in MODULES and "." in name and name not in {"trimsfs.daemon", "mountctl.keeper", *PLUGGED}:
                yield name


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module, but for the names of extras that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            body = [each for each in node.body if "trimsfs.extras" not in ast.unparse(each)]
            yield from (inner for each in (*body, *node.orelse) for inner in ast.walk(each))
        else:
            yield node
            yield from _run(node)


def importers(library: str) -> set[str]:
    """The modules of both programs that import a library."""
    return {module for module, path in MODULES.items() if any(name.split(".")[0] == library for name in imports(path))}


def arrows() -> Iterator[tuple[str, str]]:
    """Each import of a module of ours by another; of a package only where it is more than the way to a module, and of
    a program's root, which has its version, never."""
    for module, path in MODULES.items():
        names = {name for name in imports(path) if name in MODULES and "." in name and name != module}
        for name in names:
            if name not in PACKAGES or not any(other.startswith(f"{name}.") for other in names):
                yield module, name


def room(module: str) -> str | None:
    """The package below the program's root in which a module lies; None for one at the root."""
    parts = module.split(".")
    return parts[1] if ".".join(parts[:2]) in PACKAGES and len(parts) > 1 else None


def rank(module: str) -> int:
    """How far below the top a module is."""
    program, found = module.split(".", maxsplit=1)[0], room(module)
    if module in ENTRY_POINTS:
        return -1
    ranks = RANKS[program]
    if found is None:
        return len(ranks)
    [number] = [number for number, rooms in enumerate(ranks) if found in rooms]
    return number


def test_the_packages_are_found() -> None:
    rooms = {name for name in PACKAGES if name.count(".") == 1}
    assert rooms == {f"{program}.{name}" for program, ranks in RANKS.items() for names in ranks for name in names}


def test_every_import_runs_downwards() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, name in arrows()
        if module.split(".")[0] == name.split(".")[0]
        and (room(module) is None or room(module) != room(name))
        and not (rank(module) == rank(name) and room(module) is room(name) is None)
        and rank(module) >= rank(name)
    ]
    assert upwards == []


@pytest.mark.parametrize("table", PLUGGED)
def test_extras_plug_in_at_one_place(table: str) -> None:
    readers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == table
    }
    assert readers == PLUGGED[table]


def test_no_package_has_more_modules_than_can_be_seen_at_once() -> None:
    counts = Counter(name.rpartition(".")[0] for name in MODULES.keys() - PACKAGES)
    crowded = {
        package: count
        for package, count in counts.items()
        if count > (MOST_IN_PACKAGE if "." in package else MOST_AT_ROOT)
    }
    assert crowded == {}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, name in arrows():
        # What a package re-exports counts as imported by who asks the package for it, not by the modules inside it.
        if not f"{module}.".startswith(f"{name}."):
            graph[module].add(name)
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(MODULES)


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("awscrt", "trimsfs.checksums"),
        ("boto3", "trimsfs.stores.s3"),
        ("cryptography", "trimsfs.extras.signatures.signed_manifest"),
        ("cuda", "trimsfs.extras.gpu.cuda"),
        ("botocore", "trimsfs.stores.s3"),
        ("azure", "trimsfs.extras.stores.cloud"),
        ("google", ("mountctl.extras.csi", "trimsfs.extras.stores.cloud")),
        ("grpc", "mountctl.extras.csi"),
        ("huggingface_hub", "trimsfs.extras.stores.huggingface"),
        ("opentelemetry", "trimsfs.extras.tracing.otlp"),
        ("prometheus_client", ("trimsfs.control.metrics", "trimsfs.extras.exporter.merged_metrics")),
        ("pyfuse3", "trimsfs.fuse"),
        ("sqlite3", "trimsfs.tiers"),
        ("xattr", "trimsfs.client.file_attributes"),
    ],
)
def test_a_library_has_one_home(library: str, home: str | tuple[str, ...]) -> None:
    """Prometheus' has two: one renders what a server counts, the other merges what many servers have rendered.
    ``google`` is a name that two libraries share: protobuf and google-auth."""
    homes = (home,) if isinstance(home, str) else home
    found = importers(library)
    assert found
    assert {each for each in found if each not in homes and not each.startswith(tuple(f"{h}." for h in homes))} == set()


def test_only_the_assembly_knows_the_disk_tier_as_a_whole() -> None:
    """Other modules take its interfaces, or one of its components."""
    found = {module for module, name in arrows() if name == "trimsfs.tiers.disk.disk_tier"}
    assert found == {"trimsfs.server.assembly", "trimsfs.server.components"}


@pytest.mark.parametrize("module", PURE)
def test_what_is_pure_knows_nothing_of_trio(module: str) -> None:
    assert module in MODULES
    assert module not in importers("trio")


def test_the_file_system_does_not_know_the_mounter() -> None:
    assert not {module for module in importers("mountctl") if module.startswith("trimsfs")}


def test_the_mounter_knows_little_of_the_file_system() -> None:
    used = {name for module, name in arrows() if module.startswith("mountctl") and name.startswith("trimsfs")}
    assert used
    assert used <= KNOWN_TO_MOUNTCTL


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_package_says_in_one_sentence_what_it_owns(package: str) -> None:
    first = (ast.get_docstring(ast.parse(MODULES[package].read_text())) or "").split("\n\n")[0]
    assert first.endswith(".")
    assert first.count(". ") == 0


@pytest.mark.parametrize(
    "program", ["tests.benchmarks.__main__", "tests.benchmarks.gpu.__main__", "tests.demo", "tests.evaluation.__main__"]
)
def test_what_others_run_needs_nothing_of_the_tests(program: str) -> None:
    """`make demo`, `make bench`, `make bench-gpu` and `make eval` install less than `make test` does."""
    code = f"import sys; sys.modules |= dict.fromkeys(['pytest', 'hypothesis', 'moto', 'xdist']); import {program}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_imported_out_of_a_test_or_a_conftest() -> None:
    """What tests share lives in tests/support, or in a module beside them if one directory has all its users."""
    found = [
        f"{name}: {ast.unparse(node)}"
        for name, path in sources("tests").items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        if re.search(r"\b(test_\w+|conftest)\b", ast.unparse(node))
    ]
    assert found == []
