"""Checks which Kubernetes namespaces may use which part of which mount, by the operator's TOML file::

    [[tenant]]
    namespaces = ["vision", "vision-*"]     # names, with * for any characters
    mount = "models"                        # default: every mount
    paths = ["vision", "public/resnet50"]   # these and what is below them; default: all of the mount

The driver refuses a volume that no entry allows. It reads the file at each publication, so a change needs no restart.
With an invalid file, it refuses all volumes.
"""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import grpc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mountctl.extras.csi.csi_requests import model_path
from mountctl.extras.csi.status_errors import StatusError, shown

Names = Annotated[list[str], Field(min_length=1)]


class TenantsError(Exception):
    """The driver cannot use the file."""


class Tenant(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    namespaces: Names
    mount: str | None = None
    paths: Names | None = None

    def allows(self, namespace: str, mount: str, path: str) -> bool:
        """Whether this entry allows a namespace a path of a mount; "" is the whole mount."""
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
    except StatusError as error:
        raise TenantsError(f"{path}: {error}") from None
    return tenants


def check_tenant(file: Path | None, namespace: str | None, mount: str, path: str) -> None:
    """Check that a namespace may use a path of a mount; without a file, every one may. Raises StatusError."""
    if file is None:
        return
    try:
        tenants = read_tenants(file)
    except TenantsError as error:
        raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"tenants: {error}") from None
    if namespace is None:
        raise StatusError(
            grpc.StatusCode.PERMISSION_DENIED,
            "the request does not name the pod's namespace: set podInfoOnMount in the CSIDriver",
        )
    if not any(tenant.allows(namespace, mount, path) for tenant in tenants):
        what = f"path {shown(path)}" if path else "all"
        raise StatusError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"namespace {shown(namespace)} may not use {what} of mount {mount}: change the driver's --tenants file",
        )
