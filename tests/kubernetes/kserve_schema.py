"""The schema of KServe's objects, as far as the package `kserve` has it: the models of its client.

They tell the fields of each object and their types, not which are needed. They are read and not imported: the package
needs a web framework and pandas, and `.venv/kserve` has it alone.
"""

import ast
import functools
import sys
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from kubernetes_validate.utils import latest_version, schema_contents
from referencing import Registry, Resource

MODELS = Path(sys.prefix) / "kserve/kserve/models"
ELSEWHERE = {"V1ObjectMeta": "objectmeta-meta-v1"}
SCALARS = {"str": str, "bool": bool, "int": int, "float": float}


class SchemaError(Exception):
    """A document is not as the schema has it."""


@functools.cache
def models() -> dict[str, dict[str, str]]:
    """The type of each field of each model, by the name that it has in manifests."""
    found = {}
    for path in MODELS.glob("v1*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                tables = {
                    each.targets[0].id: ast.literal_eval(each.value)
                    for each in node.body
                    if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
                }
                types, names = tables["openapi_types"], tables["attribute_map"]
                found[node.name] = {names[field]: types[field] for field in types}
    return found


def check(document: dict[str, Any]) -> None:
    """Check an object of KServe. Raises SchemaError."""
    version = document["apiVersion"].removeprefix("serving.kserve.io/")
    _check(document, f"{version[0].upper()}{version[1:]}{document['kind']}", document["kind"])


def _check(value: Any, kind: str, where: str) -> None:
    if kind.startswith("list["):
        _expect(isinstance(value, list), where, kind)
        for number, each in enumerate(value):
            _check(each, kind.removeprefix("list[")[:-1], f"{where}[{number}]")
    elif kind in SCALARS:
        _expect(isinstance(value, SCALARS[kind]), where, kind)
    elif kind in models():
        _expect(isinstance(value, dict), where, kind)
        for field, below in value.items():
            _expect(field in models()[kind], f"{where}.{field}", "nothing: there is no such field")
            _check(below, models()[kind][field], f"{where}.{field}")
    elif kind.startswith("V1"):
        _check_core(value, kind, where)
    else:
        raise SchemaError(f"{where}: this check does not know {kind}")


def _check_core(value: Any, kind: str, where: str) -> None:
    """Check a part that Kubernetes' own schemas describe, such as V1Volume."""
    directory = f"kubernetes-json-schema/v{latest_version()}-local-strict"
    names = (f"{directory}/{ELSEWHERE.get(kind, f'{kind[2:].lower()}-v1')}.json", f"{directory}/_definitions.json")
    schema, definitions = (schema_contents(name, latest_version()) for name in names)
    registry: Registry[Any] = Registry().with_resources(
        (each["$id"], Resource.from_contents(each)) for each in (schema, definitions)
    )
    try:
        Draft202012Validator(schema, registry=registry).validate(value)
    except ValidationError as error:
        raise SchemaError(f"{where}: {error.message}") from None


def _expect(right: bool, where: str, kind: str) -> None:
    if not right:
        raise SchemaError(f"{where}: must be {kind}")
