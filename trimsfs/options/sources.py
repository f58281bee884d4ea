"""Reads the options of a mount from the configuration file, the environment and the command line.

Later sources win: defaults, the TOML file, ``TRIMSFS_*`` variables, the command line. This is the only module that
reads the environment for trimsfs (the SDKs of the stores read their own).
"""

import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trimsfs.errors import ConfigurationError
from trimsfs.options.eviction import by_tier
from trimsfs.options.schema import FLAGS, SCALARS, TABLES, MountOptions, flag
from trimsfs.options.size import too_small
from trimsfs.options.store_settings import PASSWORD

MOUNTPOINT = "mountpoint"
"""The key of the mount point in a configuration file that declares a mount. It is not an option of the mount."""
COMMAND_LINE, ENVIRONMENT = "command line", "environment"
"""The sources of options beside files, which their paths name."""
ENVIRONMENT_PREFIX = "TRIMSFS_"
DEFAULT_CONFIG = Path("/etc/trimsfs/config.toml")
FORMER = {"cache_policy": "disk", "host_policy": "host", "gpu_policy": "gpu"}
"""Former options, each of which is now the policy of a tier in ``eviction``: refused with the new spelling."""
_OTHER_VARIABLES = re.compile(
    # of the commands and the client library; of containers with devices by CDI
    r"CONFIG|MOUNTS_DIR|FLEET_DIR|VERBOSE|MODELS|MODEL_.*"
    # what Kubernetes sets in every pod for a service whose name begins with trimsfs
    r"|(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""The variables without their prefix that are not options, and still not misspelt."""


def keeper_order(mountpoint: Path, options: MountOptions, *, foreground: bool) -> dict[str, Any]:
    """The order for a keeper: where to mount, which server to run, and its resolved *options*."""
    return {
        "mountpoint": str(mountpoint),
        "source": options.store,
        "allow_other": options.allow_other,
        "foreground": foreground,
        "server": [sys.executable, "-m", "trimsfs.daemon"],
        "options": options.model_dump(mode="json", exclude_none=True),
    }


def declared_mountpoint(file: Path) -> Path:
    """The mount point in the *file* that declares a mount. Raises ConfigurationError."""
    mountpoint = _read_toml(file, needed=True).get(MOUNTPOINT)
    if not isinstance(mountpoint, str) or not mountpoint.startswith("/"):
        raise ConfigurationError(f'{file}: no mountpoint: write mountpoint = "/models", an absolute path')
    return Path(os.path.normpath(mountpoint))


def load_options(
    arguments: Mapping[str, Any],
    *,
    configs: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> MountOptions:
    """Merge the sources; *arguments* contains only the options that are set on the command line.

    Of several configuration files, later ones win. DEFAULT_CONFIG is read, if it exists, without any, and before one
    that declares a mount.
    Raises ConfigurationError, which names the option, its source and what is wrong with it.
    """
    environment = os.environ if environment is None else environment
    layers: list[tuple[str, Mapping[str, Any]]] = []
    files = [(path, _read_toml(path, needed=bool(configs))) for path in configs or (DEFAULT_CONFIG,)]
    if DEFAULT_CONFIG not in (path for path, _ in files) and any(MOUNTPOINT in values for _, values in files):
        files.insert(0, (DEFAULT_CONFIG, _read_toml(DEFAULT_CONFIG, needed=False)))
    for path, values in files:
        layers.append((str(path), {name: value for name, value in values.items() if name != MOUNTPOINT}))
    layers.append((ENVIRONMENT, _variables(environment)))
    layers.append((COMMAND_LINE, arguments))
    for source, layer in layers:
        _check_names(layer, source)
    layers = [(source, _with_stores(layer)) for source, layer in layers]
    merged = {name: value for _, layer in layers for name, value in layer.items()}
    if "eviction" in merged:
        merged["eviction"] = _by_tier(layers)
    try:
        options = MountOptions.model_validate(merged)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise ConfigurationError(first["msg"].removeprefix("Value error, ")) from None
        name = str(first["loc"][0])
        source = _source_of(name, layers)
        if len(first["loc"]) > 1 and name in TABLES:
            raise ConfigurationError(_in_table(name, merged[name], source, first)) from None
        written = next(layer[name] for _, layer in reversed(layers) if name in layer)
        raise ConfigurationError(f"{_spelling(name, written, source)}: {_cause(name, first)}") from None
    for name in ("cache_size", "host_size"):
        cause = too_small(getattr(options, name), merged.get(name))
        if cause is not None:
            raise ConfigurationError(f"{_spelling(name, merged[name], _source_of(name, layers))}: {cause}")
    for tenant, table in zip(options.tenants, merged.get("tenants", ()), strict=True):
        for name in ("cache_size", "host_size"):
            cause = too_small(getattr(tenant, name), table.get(name) if isinstance(table, dict) else None)
            if cause is not None:
                source = _source_of("tenants", layers)
                raise ConfigurationError(f"[[tenants]] {tenant.path} in {source}: {name}: {cause}")
    return options


def _check_names(options: Mapping[str, Any], source: str) -> None:
    """Raises ConfigurationError for a former option, and for one that the command line does not take."""
    for name, value in options.items():
        if name in FORMER:
            raise ConfigurationError(f"{_spelling(name, value, source)}: write {_eviction(options, source)}")
        if source == COMMAND_LINE and name in SCALARS and name not in FLAGS:
            spelled = flag(f"no_{name}" if value is False else name)
            raise ConfigurationError(
                f'option {spelled}: set "{name}" in the configuration file (see docs/configuration.md)'
            )


def _eviction(options: Mapping[str, Any], source: str) -> str:
    """The former options of a source as one, in its spelling."""
    policies = ",".join(f"{FORMER[name]}={value}" for name, value in options.items() if name in FORMER)
    if source == COMMAND_LINE:
        return f"--eviction {policies}"
    if source == ENVIRONMENT:
        return f"{ENVIRONMENT_PREFIX}EVICTION={policies}"
    return f'eviction = "{policies}"'


def _by_tier(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The eviction policy of each tier, from the last source that has one for it. Raises ConfigurationError."""
    policies = dict[str, Any]()
    for source, layer in layers:
        if "eviction" in layer:
            try:
                policies |= by_tier(layer["eviction"])
            except ValueError as error:
                raise ConfigurationError(f"{_spelling('eviction', layer['eviction'], source)}: {error}") from None
    return policies


def _source_of(name: str, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The source that an option is taken from."""
    chosen: str = next(source for source, layer in reversed(layers) if name in layer)
    return chosen


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The options that are set in an environment. Raises ConfigurationError for a variable that is none."""
    options = {}
    for variable, value in environment.items():
        rest = variable.removeprefix(ENVIRONMENT_PREFIX)
        name = rest.lower()
        if rest == variable or _OTHER_VARIABLES.fullmatch(rest):
            continue
        if name in (*SCALARS, *FORMER) and rest.isupper():
            options[name] = value
            continue
        if name in (*TABLES, *TABLES.values()):
            raise ConfigurationError(f"variable {variable}: a table: write [[{TABLES.get(name, name)}]] in a file")
        close = get_close_matches(name, SCALARS, n=1, cutoff=0.8)
        remedy = f"did you mean {ENVIRONMENT_PREFIX}{close[0].upper()}?" if close else "unset it"
        raise ConfigurationError(f"variable {variable}: there is no such option: {remedy}")
    return options


def _with_stores(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a source. Its tables ``[[store]]`` replace the store of earlier sources, and its store theirs."""
    match layer.get("store"):
        case None:
            return layer
        case [*tables]:
            return {**layer, "store": None, "stores": tables}
        case _:
            return {**layer, "stores": ()}


def _in_table(name: str, tables: Sequence[Any], source: str, error: ErrorDetails) -> str:
    """What is wrong with one of several tables, which is named by its path, or by its place in its source."""
    number, *below = (part for part in error["loc"][1:])
    table = tables[int(number)]
    path = table.get("path") if isinstance(table, dict) else None
    subject = f"[[{TABLES[name]}]] {path if isinstance(path, str) else f'number {int(number) + 1}'} in {source}"
    if not below:
        return f"{subject}: {_cause(name, error)}"
    field = str(below[0])
    if error["type"] == "missing":
        return f"{subject}: has no {field}: write {field} = TEXT"
    if error["type"] == "extra_forbidden" and field in (*SCALARS, *TABLES):
        return f"{subject}: {field}: is an option of the whole mount: write it above all tables"
    return f"{subject}: {field}: {_cause(field, error)}"


def _spelling(name: str, value: object, source: str) -> str:
    """An option as it is spelled in its source, with a password in a URL masked."""
    value = PASSWORD.sub("***", value) if isinstance(value, str) else value
    match source:
        case "command line":
            return f"option {flag(name)} {value}"
        case "environment":
            return f"variable {ENVIRONMENT_PREFIX}{name.upper()}={value}"
        case _:
            return f"option {name} = {value!r} in {source}"


def _cause(name: str, error: ErrorDetails) -> str:
    """What is wrong with a value: the rest of a sentence that begins with its spelling."""
    context = error.get("ctx", {})
    kind = error["type"]
    if kind.startswith("byte_size"):
        return "is not a size such as 10GiB"
    if kind in {"greater_than_equal", "greater_than", "less_than_equal"}:
        (bound,) = context.values()
        amount = (
            f"{bound >> 20}MiB" if name == "memory_limit" else oct(bound)[2:] if "mode" in name else f"{bound:.10g}"
        )
        return {
            "greater_than_equal": f"must be {amount} or more",
            "greater_than": f"must be more than {amount}",
            "less_than_equal": f"must be {amount} or less",
        }[kind]
    causes = {
        "extra_forbidden": f"there is no such option{_meant(name)}",
        "string_type": "must be text in quotes",
        "literal_error": f"must be {context.get('expected')}",
        "int_parsing": "is not a whole number",
        "float_parsing": "is not a share such as 0.8" if name == "gpu_memory" else "is not a number",
        "finite_number": "must be finite",
        "bool_parsing": "must be true or false",
    }
    return causes.get(kind, error["msg"].removeprefix("Value error, "))


def _meant(name: str) -> str:
    """Which option a misspelt name may be for, as the end of a message."""
    close = get_close_matches(name.replace("-", "_"), (*SCALARS, *TABLES.values()), n=1, cutoff=0.8)
    return f": did you mean {close[0]}?" if close else ""


def _read_toml(path: Path, *, needed: bool) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if not needed:
            return {}
        raise ConfigurationError(f"configuration file {path}: No such file or directory") from None
    except OSError as error:
        remedy = ": run it as root, or let others read it" if isinstance(error, PermissionError) else ""
        raise ConfigurationError(f"configuration file {path}: {error.strerror}{remedy}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"configuration file {path}: not valid TOML: {error}") from None
    for name in TABLES.values():
        if isinstance(values.get(name), dict):
            raise ConfigurationError(f"[{name}] in {path}: is one of several tables: write [[{name}]]")
    if "stores" in values:
        raise ConfigurationError(f"[[stores]] in {path}: there is no such table: write [[store]]")
    rules = values.get("access")
    for table in (values, *(rules if isinstance(rules, list) else [])):
        for name in ("mode", "dir_mode"):
            value = table.get(name) if isinstance(table, dict) else None
            if isinstance(value, int) and set(str(value)) <= set("01234567"):
                # TOML reads 444 as decimal, but users mean octal; 0o444 and most other octal literals pass.
                raise ConfigurationError(f'option {name} = {value} in {path}: write it as text, such as "0444"')
    return values
