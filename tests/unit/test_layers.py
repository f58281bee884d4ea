"""Which module may import what."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mountctl
import trimsfs

ROOT = Path(trimsfs.__file__).parent.parent
PURE = ("concurrency", "errors", "eviction", "options", "ranges", "readahead", "text", "types")


def sources(package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names; a package is named for its ``__init__``."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, everywhere in it; of ``from a import b`` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(library: str) -> set[str]:
    """The modules of both packages that import a library."""
    return {
        module
        for package in ("trimsfs", "mountctl")
        for module, path in sources(package).items()
        if any(name.split(".")[0] == library for name in imports(path))
    }


def test_the_packages_are_found() -> None:
    assert Path(mountctl.__file__).parent.parent == ROOT
    assert {"trimsfs", "trimsfs.types", "trimsfs.stores.s3", "trimsfs.tiers.disk.tier"} <= sources("trimsfs").keys()


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("awscrt", "trimsfs.checksums"),
        ("boto3", "trimsfs.stores.s3"),
        ("cryptography", "trimsfs.integrity.signatures"),
        ("cuda", "trimsfs.cuda"),
        ("botocore", "trimsfs.stores.s3"),
        ("google", "mountctl.csi"),
        ("grpc", "mountctl.csi"),
        ("prometheus_client", "trimsfs.control.metrics"),
        ("pyfuse3", "trimsfs.fuse"),
        ("sqlite3", "trimsfs.tiers"),
    ],
)
def test_a_library_has_one_home(library: str, home: str) -> None:
    found = importers(library)
    assert found
    assert {module for module in found if module != home and not module.startswith(f"{home}.")} == set()


@pytest.mark.parametrize("module", PURE)
def test_what_is_pure_knows_nothing_of_trio(module: str) -> None:
    assert f"trimsfs.{module}" not in importers("trio")


def test_the_file_system_does_not_know_the_mounter() -> None:
    assert not {module for module in importers("mountctl") if module.startswith("trimsfs")}


def test_the_mounter_knows_little_of_the_file_system() -> None:
    known = sources("trimsfs").keys()
    used = {name for path in sources("mountctl").values() for name in imports(path) if name in known}
    few = {"errors", "exit_codes", "mountinfo", "options", "text"}
    assert used - {"trimsfs"} <= {f"trimsfs.{name}" for name in few}
    assert used


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = sources("trimsfs")
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    # What a package re-exports counts as imported by who asks the package for it, not by the modules inside it.
    graph = {
        module: {name for name in imports(path) if name in modules and name not in packages}
        | {name for name in imports(path) if name in packages and not f"{module}.".startswith(f"{name}.")}
        for module, path in modules.items()
    }
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(modules)


@pytest.mark.parametrize(
    "program", ["tests.benchmarks.__main__", "tests.benchmarks.gpu.__main__", "tests.demo", "tests.evaluation.__main__"]
)
def test_what_others_run_needs_nothing_of_the_tests(program: str) -> None:
    """`make demo`, `make bench`, `make bench-gpu` and `make eval` install less than `make test` does."""
    code = f"import sys; sys.modules |= dict.fromkeys(['pytest', 'hypothesis', 'moto', 'xattr']); import {program}"
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
