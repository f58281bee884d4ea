"""The options of a mount that belongs to a fleet: hosts that fetch from each other before they ask the store."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from trimsfs.listen_address import parse_address
from trimsfs.options.declaration import option
from trimsfs.options.size import Size

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NEEDED = ("fleet_members", "fleet_listen", "fleet_ca", "fleet_cert", "fleet_key")
FLEET_SOCKET, FLEET_REPORTS = "fleet.sock", "fleet-reports.sock"
"""Where the server answers nginx, and where nginx reports what it has sent, in the cache directory."""
FLEET_USER = "trimsfs-nginx"
"""The user of nginx's workers, in the group of servers; if it does not exist, they run as the user of servers."""
FLEET_USERS_REMEDY = (
    f"run `useradd --system trimsfs` and `useradd --system {FLEET_USER}`, "
    "then `mountctl upgrade NAME` and `mountctl fleet apply`"
)
FLEET_DIRECTORY = Path("/var/lib/trimsfs/fleet")
"""Where `mountctl fleet` has nginx's configuration, and in the file ``drained`` the mount points that send nothing."""
LEAST_UPLOAD = 1 << 20
"""Bytes a second: below, a chunk takes longer than a member waits for it."""


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("is not a name: write at most 63 letters, digits, dots, hyphens and underscores")
    return value


def _address(value: str) -> str:
    with suppress(ValueError):
        address = parse_address(value)
        if address.path is None and address.port != 0:
            return value
    raise ValueError("is no address that other hosts reach: write ADDRESS:PORT, such as 0.0.0.0:7443")


def _members(value: str) -> str:
    if "://" in value:
        raise ValueError("is no list of hosts: write HOST:PORT,HOST:PORT, the path of a file, or one DNS name")
    return str(Path(value).absolute()) if "/" in value else value


class FleetOptions(BaseModel):
    """What a mount needs to know of its fleet; ``fleet`` is None for a mount that fetches alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fleet: Annotated[str, AfterValidator(_name)] | None = option(
        None, "Fleet", "Name of the fleet whose hosts fetch from each other before they ask the store.", metavar="NAME"
    )
    fleet_members: Annotated[str, Field(min_length=1), AfterValidator(_members)] | None = option(
        None,
        "Fleet",
        "Hosts of the fleet: HOST[:PORT],HOST[:PORT],..., a file with one a line, or one DNS name of all. "
        "Read again every 5 seconds. Default of PORT: that of fleet_listen.",
        metavar="LIST|FILE|DNS",
    )
    fleet_listen: Annotated[str, AfterValidator(_address)] | None = option(
        None,
        "Fleet",
        "Address and port at which nginx serves the fleet, such as 0.0.0.0:7443.",
        metavar="ADDRESS:PORT",
    )
    fleet_ca: Annotated[Path, AfterValidator(Path.absolute)] | None = option(
        None, "Fleet", "File with the certificate of the fleet's own CA, in PEM.", metavar="FILE"
    )
    fleet_cert: Annotated[Path, AfterValidator(Path.absolute)] | None = option(
        None, "Fleet", "File with this host's certificate of that CA, in PEM.", metavar="FILE"
    )
    fleet_key: Annotated[Path, AfterValidator(Path.absolute)] | None = option(
        None, "Fleet", "File with the certificate's private key, in PEM.", metavar="FILE"
    )
    fleet_upload_limit: Annotated[Size, Field(ge=LEAST_UPLOAD)] | None = option(
        None,
        "Fleet",
        "Most bytes a second that this host sends to others of the fleet. Default: no limit.",
        metavar="SIZE",
    )

    @model_validator(mode="after")
    def _fleet_is_whole(self) -> "FleetOptions":
        given = [name for name in (*_NEEDED, "fleet_upload_limit") if getattr(self, name) is not None]
        if self.fleet is None and given:
            raise ValueError(f"option {given[0]}: of no fleet: set fleet")
        missing = [name for name in _NEEDED if getattr(self, name) is None]
        if self.fleet is not None and missing:
            raise ValueError(f"option fleet {self.fleet}: incomplete: set {missing[0]}")
        return self
