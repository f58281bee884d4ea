"""The options of a mount: their names, types, limits, defaults and help texts.

One schema serves the configuration file, the environment and the command line; ``trimsfs.options.sources`` reads them.
"""

import os
import pwd
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    model_validator,
)

from trimsfs.listen_address import parse_address
from trimsfs.mountinfo import escape
from trimsfs.options.fleet import FleetOptions
from trimsfs.options.size import Size
from trimsfs.options.store import SEVERAL, AbsolutePath, InnerPath, StoreOptions, check_role

FALLBACK_UID = 60874
"""A user id that Debian and systemd assign to nobody."""
GPU_OFF = "switched off by --gpu off"
"""The reason shown when --gpu off disables GPUs."""


def _parse_mode(value: object) -> object:
    """Parse permission bits, which are octal in text from any source."""
    if isinstance(value, str):
        try:
            return int(value, 8)
        except ValueError:
            raise ValueError("is not an octal number such as 0444") from None
    return value


Mode = Annotated[int, BeforeValidator(_parse_mode), Field(ge=0, le=0o777)]
Identity = Annotated[int, Field(ge=0, le=(1 << 32) - 2)]
PolicyName = Literal["lru", "fifo", "lcu", "cost", "flush", "never", "eager"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _local_address(value: str) -> str:
    """A listen address that no other host reaches."""
    if not parse_address(value).local:
        raise ValueError("other hosts reach that: run `trimsfs exporter` with --token-file, or use 127.0.0.1")
    return value


class AccessRule(BaseModel):
    """Owner, group and permission bits of the paths that match a pattern, and of all below them. Later rules win."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: InnerPath
    uid: Identity | None = None
    gid: Identity | None = None
    mode: Mode | None = None
    dir_mode: Mode | None = None


class Tenant(BaseModel):
    """A directory whose models have a quota of disk and memory, or credentials of their own.

    No other model can use the quota. With ``share_cache``, other paths of the same store may have one copy with it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: InnerPath
    cache_size: Size | None = None
    host_size: Size | None = None
    profile: str | None = None
    role_arn: str | None = None
    web_identity_token_file: AbsolutePath | None = None
    share_cache: bool = False

    @property
    def has_credentials(self) -> bool:
        """Whether requests for what it reads are made with its own credentials."""
        return self.profile is not None or self.role_arn is not None

    @model_validator(mode="after")
    def _credentials_are_whole(self) -> "Tenant":
        check_role(self.role_arn, self.web_identity_token_file)
        if self.share_cache and not self.has_credentials:
            raise ValueError("share_cache: without credentials of its own, a tenant's cache is the mount's anyway")
        return self


class MountOptions(StoreOptions, FleetOptions):
    """The options of a mount. Sizes are in bytes (``10GiB`` is accepted), times in seconds."""

    cache_dir: Path | None = Field(None, description="Directory of the disk tier; one server at a time may use it.")
    cache_size: Size | None = Field(
        None, description="Most bytes of models on disk. 0: keep none. Default: as many as --min-free leaves."
    )
    cache_policy: PolicyName = Field("lru", description="Which models to evict from the disk when it is full.")
    min_free: Size = Field(ByteSize(1 << 30), description="Bytes to leave free on the cache's file system.")
    memory_limit: Annotated[Size, Field(ge=32 << 20)] = Field(
        ByteSize(128 << 20), description="Most bytes of models in the server's own memory."
    )
    host_size: Size | None = Field(
        None, description="Most bytes of models in the host's page cache. Default: as many as the kernel keeps."
    )
    host_policy: PolicyName = Field("lru", description="Which models to drop from memory when --host-size is reached.")
    gpu: Literal["auto", "off"] = Field("auto", description="Whether to lend copies of models on the host's GPUs.")
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Share of each GPU's memory that copies may take."
    )
    gpu_headroom: Size = Field(
        ByteSize(512 << 20), description="Bytes of each GPU's memory to leave free for other programs."
    )
    gpu_policy: PolicyName = Field("lru", description="Which copies to evict from a GPU when it is full.")
    gpu_sharing: Literal["all", "uid", "none"] = Field(
        "uid",
        description="Who shares a copy on a GPU. all: all who may read the file; uid: the programs of one user; "
        "none: nobody.",
    )
    passthrough: bool = Field(True, description="Have the kernel read local copies without the server, where it can.")
    derived: bool = Field(True, description="Keep what a program derives from a model for others of the same user.")
    share_chunks: bool = Field(
        False,
        description="Fetch of a version only what others of its model lack; on XFS and btrfs, also share disk blocks "
        "among models that are partly equal.",
    )
    digests: Literal["auto", "wait", "off"] = Field(
        "auto",
        description="When to compare models with the store's digests. auto: before use where that is cheap, else once "
        "the server is idle; wait: always before use; off: never.",
    )
    signatures: Literal["off", "check", "require"] = Field(
        "off",
        description="Which files must match a signed model.sig in a directory above them. check: those that have one; "
        "require: all; off: none.",
    )
    signing_key: Path | None = Field(None, description="Public key that verifies model.sig files, in PEM.")
    scrub_interval: Seconds = Field(
        7 * 86400.0, description="Seconds between scrubs, which check what is on disk for damage. 0: never."
    )
    scrub_rate: Annotated[Size, Field(ge=1 << 16)] = Field(
        ByteSize(32 << 20), description="Bytes a second that a scrub reads."
    )
    cold_open: Literal["auto", "wait", "stream"] = Field(
        "auto",
        description="What opening a model that is not cached does. wait: fetch it first; stream: return at once; auto: "
        "wait if that takes at most 0.5 s, or 3 s if it is being prefetched.",
    )
    prefetch: Literal["auto", "off", "directory"] = Field(
        "auto",
        description="What to prefetch. auto: the files likely to be opened next; directory: all of a directory once "
        "one of its files is opened; off: nothing.",
    )
    fetch_processes: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="Processes that fetch from the store. Default: one per core, 2 to 4."
    )
    trace_opens: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Share of cold opens to trace, for trimsfs trace. 0: none."
    )
    metadata_ttl: Seconds = Field(60.0, description="Seconds to cache names and sizes from the store.")
    stale_for: Seconds = Field(
        86400.0, description="Seconds to keep using expired names and sizes while the store does not answer."
    )
    retry_deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        15.0, description="Seconds to retry a failing request before a read gets EIO."
    )
    stall_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        5.0,
        description="Seconds without a byte from the store before a request is retried.",
    )
    allow_other: bool | None = Field(None, description="Let other users in. Default: yes if root mounts, else no.")
    uid: Identity | None = Field(None, description="Owner of all files. Default: the mounting user.")
    gid: Identity | None = Field(None, description="Group of all files. Default: the mounting user's.")
    mode: Mode = Field(0o444, description="Permission bits of files, octal; write bits are ignored.")
    dir_mode: Mode | None = Field(
        None, description="Permission bits of directories, octal. Default: --mode, plus x where r is set."
    )
    access: tuple[AccessRule, ...] = Field((), description="Owner, group and mode by path. Only in a file.")
    tenants: tuple[Tenant, ...] = Field((), description="Shares of disk and memory by path. Only in a file.")
    control_gid: Identity | None = Field(
        None, description="Group that may warm, pin and evict, besides root and the owner."
    )
    server_user: str | None = Field(
        None, description="User that runs the server if root mounts. Default: trimsfs if it exists, else uid 60874."
    )
    fence: bool = Field(True, description="Confine the server with landlock and seccomp.")
    metrics_listen: Annotated[str, AfterValidator(_local_address)] | None = Field(
        None,
        description="Serve metrics of all mounts, and a status page, at 127.0.0.1:PORT or unix:PATH: one process for "
        "the host, which ends with the last mount.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe messages to log.")
    log_file: Path | None = Field(
        None,
        description="File that a background mount logs to. Default: /var/log/trimsfs/NAME.log for root, else "
        "trimsfs.log in the cache directory.",
    )

    @model_validator(mode="after")
    def _key_is_told(self) -> "MountOptions":
        if self.signatures != "off" and self.signing_key is None:
            raise ValueError(f"option --signatures {self.signatures}: needs the public key: set --signing-key FILE")
        if self.signatures == "off" and self.signing_key is not None:
            raise ValueError("option --signing-key: nothing is checked: set --signatures check or require")
        if self.signatures != "off" and self.digests == "off":
            raise ValueError(f"option --signatures {self.signatures}: needs digests: leave out --digests off")
        return self

    @model_validator(mode="after")
    def _tenants_differ(self) -> "MountOptions":
        paths = [tenant.path for tenant in self.tenants]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise ValueError(f"tenants: {twice} has two tables: leave out one")
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> "MountOptions":
        for name in ("cache_size", "host_size"):
            total = getattr(self, name)
            shares = sum(getattr(tenant, name) or 0 for tenant in self.tenants)
            if total is not None and shares > total:
                raise ValueError(f"tenants: their {name} add up to {shares} bytes, more than {name}, {total}")
        return self

    def resolved(self, mountpoint: Path) -> "MountOptions":
        """These options, with the defaults that depend on the user and the mount point filled in."""
        root = os.geteuid() == 0
        cache = Path("/var/cache/trimsfs") if root else platformdirs.user_cache_path("trimsfs")
        cache_dir = self.cache_dir or cache / escape(mountpoint)
        log_file = Path("/var/log/trimsfs", f"{escape(mountpoint)}.log") if root else cache_dir / "trimsfs.log"
        return self.model_copy(
            update={
                "store": SEVERAL if self.stores else _absolute(self.store) if self.store else str(default_store()),
                "stores": tuple(table.model_copy(update={"store": _absolute(table.store)}) for table in self.stores),
                "cache_dir": cache_dir.absolute(),
                "fetch_processes": self.fetch_processes or min(4, max(2, os.cpu_count() or 1)),
                "sse_c_key_file": self.sse_c_key_file.absolute() if self.sse_c_key_file is not None else None,
                "signing_key": self.signing_key.absolute() if self.signing_key is not None else None,
                "log_file": (self.log_file or log_file).absolute(),
                "allow_other": root if self.allow_other is None else self.allow_other,
                "uid": os.geteuid() if self.uid is None else self.uid,
                "gid": os.getegid() if self.gid is None else self.gid,
                "mode": self.mode & 0o555,
                "server_user": (self.server_user or default_user()) if root else None,
                "dir_mode": searchable(self.mode) if self.dir_mode is None else self.dir_mode,
            }
        )


TABLES = {"access": "access", "tenants": "tenants", "stores": "store"}
"""The options that are tables of a configuration file, and their names there, such as ``[[access]]``."""
SCALARS = tuple(
    name
    for options in (StoreOptions, MountOptions, FleetOptions)
    for name in options.__annotations__
    if name in MountOptions.model_fields and name not in TABLES
)
"""The options that the environment and the command line accept too."""


def default_user() -> str:
    """The default of --server-user when root mounts."""
    try:
        return pwd.getpwnam("trimsfs").pw_name
    except KeyError:
        return str(FALLBACK_UID) if _mapped(FALLBACK_UID) else "root"


def _mapped(uid: int) -> bool:
    """Whether this user namespace maps the user id."""
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return True
    return any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges)


def searchable(mode: int) -> int:
    """The permission bits of directories whose files have *mode*: whoever may read may also search."""
    read_bits = mode & 0o444
    return read_bits | read_bits >> 2


def default_store() -> Path:
    """The default store: a local directory that the first mount without --store creates."""
    root = os.geteuid() == 0
    return (Path("/var/lib/trimsfs") if root else platformdirs.user_data_path("trimsfs")) / "models"


def _absolute(store: str) -> str:
    return store if "://" in store else str(Path(store).absolute())


def flag(name: str) -> str:
    """The name of an option on the command line."""
    return "--" + name.replace("_", "-")
