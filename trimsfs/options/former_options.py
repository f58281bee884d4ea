"""Options that were set otherwise in an earlier version, or are no longer flags: what to write now."""

from collections.abc import Mapping
from typing import Any

from trimsfs.errors import ConfigurationError
from trimsfs.options.schema import FLAGS, SCALARS, MountOptions, flag

COMMAND_LINE, ENVIRONMENT = "command line", "environment"
"""The sources of options beside files, which their paths name."""
ENVIRONMENT_PREFIX = "TRIMSFS_"
FORMER = {"cache_policy": "disk", "host_policy": "host", "gpu_policy": "gpu"}
"""Options of earlier versions, each of which is now the policy of a tier in ``eviction``."""


def refuse_former(options: Mapping[str, Any], source: str) -> None:
    """Raise ConfigurationError for an option that its source does not take any more: it tells the new spelling."""
    policies = {FORMER[name]: value for name, value in options.items() if name in FORMER}
    for name, value in options.items():
        if name in FORMER:
            raise ConfigurationError(f"{_written(name, value, source)}: write {_eviction(policies, source)}")
        if source == COMMAND_LINE and name in SCALARS and name not in FLAGS:
            told = f'set "{name}" in the configuration file (see docs/configuration.md)'
            raise ConfigurationError(f"{_written(name, value, source)}: {told}")


def _written(name: str, value: object, source: str) -> str:
    match source:
        case "command line":
            return f"option {flag(f'no_{name}' if value is False else name)}"
        case "environment":
            return f"variable {ENVIRONMENT_PREFIX}{name.upper()}"
        case _:
            return f"option {name} in {source}"


def _eviction(policies: Mapping[str, object], source: str) -> str:
    """The policies of tiers, as the source spells them now."""
    listed = ",".join(f"{tier}={policy}" for tier, policy in policies.items())
    match source:
        case "command line":
            return f"--eviction {listed}"
        case "environment":
            return f"{ENVIRONMENT_PREFIX}EVICTION={listed}"
        case _:
            return "eviction = { " + ", ".join(f'{tier} = "{policy}"' for tier, policy in policies.items()) + " }"


def ordered_options(order: Mapping[str, Any]) -> MountOptions:
    """The options of a keeper's order, resolved already. A keeper of an earlier version has the names of its own."""
    options = {name: value for name, value in order.items() if name not in FORMER}
    former = {tier: order[name] for name, tier in FORMER.items() if name in order}
    return MountOptions.model_validate({**options, "eviction": former} if former else options)
