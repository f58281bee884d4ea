"""Which namespaces may have which part of which mount, as an operator says in a TOML file::

    [[tenant]]
    namespaces = ["vision", "vision-*"]     # names, with * for any characters
    mount = "models"                        # default: every mount
    paths = ["vision", "public/resnet50"]   # these and what is below them; default: all of the mount

What no entry allows is refused. The file is read at each publication, so a change needs no restart; one that cannot be
read or understood allows nothing.
"""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import grpc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mountctl.csi.refusals import RefusedError, shown
from mountctl.csi.requests import model_path

Names = Annotated[list[str], Field(min_length=1)]


class TenantsError(Exception):
    """The file cannot be used."""


class Tenant(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespaces: Names
    mount: str | None = None
    paths: Names | None = None

    def allows(self, namespace: str, mount: str, path: str) -> bool:
        """Whether this entry lets a namespace have a path of a mount; "" is all of the mount."""
        return (
            any(fnmatchcase(namespace, pattern) for pattern in self.namespaces)
            and self.mount in {None, mount}
            and (self.paths is None or any(f"{path}/".startswith(f"{allowed}/") for allowed in self.paths))
        )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: list[Tenant] = []


def read_tenants(path: Path) -> list[Tenant]:
    """The entries of a file. Raises TenantsError with one line."""
    try:
        tenants = _File.model_validate(tomllib.loads(path.read_text())).tenant
        for tenant in tenants:
            for allowed in tenant.paths or []:
                if not model_path(allowed, "paths"):
                    raise TenantsError(f"{path}: paths '': leave paths out for all of the mount")
    except OSError as error:
        raise TenantsError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TenantsError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TenantsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except RefusedError as error:
        raise TenantsError(f"{path}: {error}") from None
    return tenants


def check_tenant(file: Path | None, namespace: str | None, mount: str, path: str) -> None:
    """Let a namespace have a path of a mount; without a file all may have all. Raises RefusedError."""
    if file is None:
        return
    try:
        tenants = read_tenants(file)
    except TenantsError as error:
        raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, f"tenants: {error}") from None
    if namespace is None:
        raise RefusedError(
            grpc.StatusCode.PERMISSION_DENIED,
            "the pod's namespace is not told: have podInfoOnMount in the CSIDriver",
        )
    if not any(tenant.allows(namespace, mount, path) for tenant in tenants):
        what = f"path {shown(path)}" if path else "all"
        raise RefusedError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"namespace {shown(namespace)} may not have {what} of mount {mount}: see the tenants file of the driver",
        )
