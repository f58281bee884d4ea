"""The options of where a mount's models come from: its store, or several."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from trimsfs.options.declaration import option

SEVERAL = "several stores"
"""The store of a mount whose configuration has ``[[store]]`` tables."""
PASSWORD = re.compile(r"(?<=://)[^/]*:[^/]*(?=@)")
"""A user and a password in a URL."""


def _inner_path(value: str) -> str:
    """A path on the mount, or a pattern of paths, without slashes at its ends."""
    path = value.strip("/")
    if not path or any(part in {"", ".", ".."} for part in path.split("/")):
        raise ValueError("is not a path below the mount point")
    return path


AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]
InnerPath = Annotated[str, AfterValidator(_inner_path)]


def check_role(role_arn: str | None, web_identity_token_file: Path | None) -> None:
    """Raise ValueError for a role that is no ARN, and for a token without the role that it is for."""
    if role_arn is not None and not role_arn.startswith("arn:"):
        raise ValueError("role_arn: must be an ARN, as arn:aws:iam::ACCOUNT:role/NAME")
    if web_identity_token_file is not None and role_arn is None:
        raise ValueError("web_identity_token_file: needs the role: set role_arn")


def _without_password(value: str | None) -> str | None:
    if value is not None and PASSWORD.search(value):
        raise ValueError("credentials do not belong there: all users can read the URL in /proc/mounts")
    return value


class StoreTable(BaseModel):
    """One of several stores of a mount, and where it is. What it does not say is as in the mount's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: InnerPath
    store: Annotated[str, Field(min_length=1), AfterValidator(_without_password)]
    layout: Literal["plain", "hf-cache"] | None = None
    allow_empty: bool | None = None
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    role_arn: str | None = None
    web_identity_token_file: AbsolutePath | None = None
    addressing_style: Literal["auto", "path", "virtual"] | None = None
    anonymous: bool | None = None
    requester_pays: bool | None = None
    sse_c_key_file: AbsolutePath | None = None
    transfer_acceleration: bool | None = None
    plain_http: bool | None = None
    retry_deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    stall_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class StoreOptions(BaseModel):
    """What a mount needs to know of its stores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Annotated[str, AfterValidator(_without_password)] | None = option(
        None,
        "Store",
        "s3://, gs:// or az://BUCKET[/PREFIX], hf://ORG/NAME[@REVISION], oci://REGISTRY/REPOSITORY[:TAG] "
        "or a directory.",
        flag=True,
        metavar="URL",
    )
    layout: Literal["plain", "hf-cache"] = option(
        "plain",
        "Store",
        "As in the store, or repositories as a Hugging Face cache, for HF_HUB_CACHE.",
        flag=True,
    )
    stores: tuple[StoreTable, ...] = option((), "Store", "Several stores by path, instead of one.")
    allow_empty: bool = option(False, "Store", "Mount a prefix that holds no object yet.", flag=True)
    endpoint_url: str | None = option(
        None, "Store", "Address of the store's server, if it is not the service's own.", flag=True, metavar="URL"
    )
    region: str | None = option(None, "Store", "S3 region.", flag=True)
    addressing_style: Literal["auto", "path", "virtual"] = option(
        "auto", "Store", "How S3 requests name the bucket.", flag=True
    )
    requester_pays: bool = option(False, "Store", "Pay for requests to an S3 bucket that charges who asks.", flag=True)
    transfer_acceleration: bool = option(False, "Store", "Use the S3 Transfer Acceleration endpoint.", flag=True)
    plain_http: bool | None = option(
        None,
        "Store",
        "Speak HTTP without TLS to an OCI registry. Default: yes for one on this host, else no.",
    )
    profile: str | None = option(None, "Credentials", "Profile of the AWS configuration files.", flag=True)
    anonymous: bool = option(False, "Credentials", "Send requests unsigned, and to a hub without a token.", flag=True)
    sse_c_key_file: Path | None = option(
        None,
        "Credentials",
        "Key of objects encrypted by SSE-C: 32 bytes, or these in base64.",
        flag=True,
        metavar="FILE",
    )
    role_arn: str | None = option(None, "Credentials", "Role to assume for S3 requests, by STS.", metavar="ARN")
    web_identity_token_file: AbsolutePath | None = option(
        None, "Credentials", "File of the web identity token for role_arn.", metavar="FILE"
    )

    @model_validator(mode="after")
    def _token_has_a_role(self) -> Self:
        check_role(self.role_arn, self.web_identity_token_file)
        for table in self.stores:
            check_role(table.role_arn or self.role_arn, table.web_identity_token_file)
        return self

    @model_validator(mode="after")
    def _stores_lie_apart(self) -> Self:
        paths = sorted(f"{table.path}/" for table in self.stores)
        for above, below in pairwise(paths):
            if below.startswith(above):
                raise ValueError(
                    f"[[store]] path {below[:-1]}: lies at or below that of another, {above[:-1]}: choose another path"
                )
        return self

    def each_store(self) -> list[tuple[str, Self]]:
        """Each store's path with a slash, and its options; the path is empty if the mount has a single one."""
        if not self.stores:
            return [("", self)]
        return [
            (
                f"{table.path}/",
                self.model_copy(update={**table.model_dump(exclude={"path"}, exclude_none=True), "stores": ()}),
            )
            for table in self.stores
        ]
