"""Writes the software bill of materials (CycloneDX) of a built artefact.

``sbom.py NAME VERSION KIND TREE OUTPUT``, where KIND is ``library``, ``application`` or ``container``, and TREE a root
file system, or a directory in one. It lists what is below TREE: Python packages, also vendored ones; the libfuse of
trimsfs' wheel; Debian packages where TREE has dpkg's database.
"""

import re
import sys
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from importlib.metadata import Distribution
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL


def python_packages(tree: Path) -> Iterator[Component]:
    for directory in tree.rglob("*.dist-info"):
        metadata = Distribution.at(directory).metadata
        name, version = metadata["Name"], metadata["Version"]
        told = metadata["License-Expression"] or metadata["License"] or ""
        licence = told if told and len(told) < 80 else "; ".join(classified(metadata.get_all("Classifier") or []))
        yield Component(
            name=name,
            version=version,
            licenses=[LicenseFactory().make_from_string(licence)] if licence else [],
            purl=PackageURL("pypi", name=re.sub(r"[-_.]+", "-", name).lower(), version=version),
        )


def classified(classifiers: list[str]) -> list[str]:
    return [each.rpartition(" :: ")[2] for each in classifiers if each.startswith("License :: ")]


def libfuse(tree: Path) -> Iterator[Component]:
    for library in tree.rglob("trimsfs.libs/libfuse3-*.so.*"):
        version = library.name.partition(".so.")[2]
        licences = [LicenseFactory().make_from_string("LGPL-2.1-only")]
        yield Component(
            name="libfuse", version=version, licenses=licences, purl=PackageURL("github", "libfuse", "libfuse", version)
        )


def debian_packages(tree: Path) -> Iterator[Component]:
    database = tree / "var/lib/dpkg/status"
    for paragraph in database.read_bytes().split(b"\n\n") if database.exists() else []:
        package = BytesHeaderParser().parsebytes(paragraph)
        if package["Status"] == "install ok installed":
            name, version = package["Package"], package["Version"]
            where = {"arch": package["Architecture"], "distro": "debian-13"}
            yield Component(name=name, version=version, purl=PackageURL("deb", "debian", name, version, where))


def bill(name: str, version: str, kind: str, tree: Path) -> str:
    """The bill as JSON, valid by CycloneDX's schema."""
    bom = Bom()
    bom.metadata.component = Component(name=name, version=version, type=ComponentType(kind))
    bom.components.update(python_packages(tree), libfuse(tree), debian_packages(tree))
    for component in bom.components:
        component.bom_ref.value = str(component.purl)
    bom.register_dependency(bom.metadata.component, bom.components)
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    invalid = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert invalid is None, invalid
    return text


if __name__ == "__main__":
    name, version, kind, tree, output = sys.argv[1:]
    Path(output).write_text(bill(name, version, kind, Path(tree)) + "\n")
