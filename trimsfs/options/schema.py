"""The options of a mount: their names, types, limits, defaults and help texts.

One schema serves the configuration file, the environment and, for options that are flags, the command line;
``trimsfs.options.sources`` reads them. Each option is declared with its heading in the help and the documentation.
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

from trimsfs.eviction_policies import NAMES
from trimsfs.listen_address import parse_address
from trimsfs.mountinfo import escape
from trimsfs.options.declaration import HEADINGS, declaration, option
from trimsfs.options.eviction import TIERS, Eviction, EvictionOption
from trimsfs.options.fleet_options import FleetOptions
from trimsfs.options.size import Size
from trimsfs.options.store_settings import SEVERAL, AbsolutePath, InnerPath, StoreOptions, check_role

FALLBACK_UID = 60874
"""A user id that Debian and systemd assign to nobody."""
GPU_OFF = 'switched off by gpu = "off"'
"""The reason shown when the option ``gpu`` disables GPUs."""


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

    cache_dir: Path | None = option(
        None, "Cache", "Directory of the disk tier; one server at a time may use it.", flag=True, metavar="DIR"
    )
    cache_size: Size | None = option(
        None, "Cache", "Most bytes on disk. 0: keep none. Default: what --min-free leaves.", flag=True, metavar="SIZE"
    )
    min_free: Size = option(
        ByteSize(1 << 30), "Cache", "Bytes to leave free on the cache's file system.", flag=True, metavar="SIZE"
    )
    eviction: EvictionOption = option(
        Eviction(),
        "Cache",
        f"Which models to evict first: {', '.join(NAMES)}. For one TIER of {', '.join(TIERS)}: disk=lcu,gpu=never.",
        flag=True,
        metavar="[TIER=]POLICY",
    )
    share_chunks: bool = option(
        False,
        "Cache",
        "Fetch of a version only what differs; on XFS, btrfs share blocks.",
        flag=True,
    )
    derived: bool = option(True, "Cache", "Keep what a program derives from a model for others of the same user.")
    host_size: Size | None = option(
        None, "Memory", "Most bytes in the page cache. Default: what the kernel keeps.", flag=True, metavar="SIZE"
    )
    memory_limit: Annotated[Size, Field(ge=32 << 20)] = option(
        ByteSize(128 << 20), "Memory", "Most bytes of models in the server's own memory.", flag=True, metavar="SIZE"
    )
    cold_open: Literal["auto", "wait", "stream"] = option(
        "auto",
        "Reads",
        "What opening a model that is not cached does: fetch it first (wait), return at once (stream), or wait if that "
        "takes at most 0.5 s, or 3 s if it is being prefetched (auto).",
        flag=True,
    )
    prefetch: Literal["auto", "off", "directory"] = option(
        "auto",
        "Reads",
        "Prefetch what is likely to be opened next (auto), or all of a directory once a file of it is opened.",
        flag=True,
    )
    passthrough: bool = option(True, "Reads", "Have the kernel read local copies without the server, where it can.")
    metadata_ttl: Seconds = option(
        60.0, "Network", "Seconds to cache names and sizes from the store.", flag=True, metavar="S"
    )
    stale_for: Seconds = option(
        86400.0,
        "Network",
        "Seconds to keep using expired names and sizes while the store does not answer.",
        metavar="S",
    )
    retry_deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] = option(
        15.0, "Network", "Seconds to retry a request before a read gets EIO.", flag=True, metavar="S"
    )
    stall_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = option(
        5.0, "Network", "Seconds without a byte from the store before a request is retried.", metavar="S"
    )
    fetch_processes: Annotated[int, Field(ge=1, le=64)] | None = option(
        None, "Network", "Processes that fetch from the store. Default: one per core, 2 to 4.", metavar="N"
    )
    digests: Literal["auto", "wait", "off"] = option(
        "auto",
        "Data integrity",
        "When to compare models with the store's digests: before use (wait), or only where that is cheap, else when "
        "idle (auto).",
        flag=True,
    )
    scrub_interval: Seconds = option(
        7 * 86400.0,
        "Data integrity",
        "Seconds between scrubs, which check what is on disk for damage. 0: never.",
        metavar="S",
    )
    scrub_rate: Annotated[Size, Field(ge=1 << 16)] = option(
        ByteSize(32 << 20), "Data integrity", "Bytes a second that a scrub reads.", metavar="SIZE"
    )
    signatures: Literal["off", "check", "require"] = option(
        "off",
        "Data integrity",
        "Which files must match a signed model.sig in a directory above them. check: those that have one; "
        "require: all; off: none.",
    )
    signing_key: Path | None = option(
        None, "Data integrity", "Public key that verifies model.sig files, in PEM.", metavar="FILE"
    )
    allow_other: bool | None = option(
        None, "Access", "Let other users in. Default: yes if root mounts, else no.", flag=True
    )
    uid: Identity | None = option(
        None, "Access", "Owner of all files. Default: the mounting user.", flag=True, metavar="UID"
    )
    gid: Identity | None = option(
        None, "Access", "Group of all files. Default: the mounting user's.", flag=True, metavar="GID"
    )
    mode: Mode = option(
        0o444,
        "Access",
        "Permission bits, octal, without w. Directories get x where r is set.",
        flag=True,
        metavar="OCTAL",
    )
    dir_mode: Mode | None = option(
        None, "Access", "Permission bits of directories, octal. Default: mode, plus x where r is set.", metavar="OCTAL"
    )
    control_gid: Identity | None = option(
        None,
        "Access",
        "Group that may warm, pin and evict, besides root and the owner.",
        flag=True,
        metavar="GID",
    )
    access: tuple[AccessRule, ...] = option((), "Access", "Owner, group and mode by path.")
    tenants: tuple[Tenant, ...] = option((), "Access", "Shares of disk and memory by path.")
    server_user: str | None = option(
        None, "Server", "Who runs it if root mounts. Default: trimsfs, else uid 60874.", flag=True, metavar="USER"
    )
    fence: bool = option(True, "Server", "Confine the server with landlock and seccomp.")
    metrics_listen: Annotated[str, AfterValidator(_local_address)] | None = option(
        None,
        "Server",
        "Serve metrics and a status page at 127.0.0.1:PORT or unix:PATH.",
        flag=True,
        metavar="ADDRESS",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "Logging", "Least severe messages to log.", flag=True
    )
    log_file: Path | None = option(
        None,
        "Logging",
        "Log of a background mount. Default: /var/log/trimsfs/NAME.log for root, else trimsfs.log in the cache.",
        flag=True,
        metavar="FILE",
    )
    trace_opens: Annotated[float, Field(ge=0, le=1)] = option(
        1.0, "Logging", "Share of cold opens to trace, for trimsfs trace. 0: none.", metavar="SHARE"
    )
    gpu: Literal["auto", "off"] = option("auto", "GPU", "Whether to lend copies of models on the host's GPUs.")
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = option(
        0.8, "GPU", "Share of each GPU's memory that copies may take.", metavar="SHARE"
    )
    gpu_headroom: Size = option(
        ByteSize(512 << 20), "GPU", "Bytes of each GPU's memory to leave free for other programs.", metavar="SIZE"
    )
    gpu_sharing: Literal["all", "uid", "none"] = option(
        "uid",
        "GPU",
        "Who shares a copy on a GPU. all: all who may read the file; uid: the programs of one user; none: nobody.",
    )

    @model_validator(mode="after")
    def _key_is_told(self) -> "MountOptions":
        if self.signatures != "off" and self.signing_key is None:
            raise ValueError(f"option signatures {self.signatures}: needs the public key: set signing_key")
        if self.signatures == "off" and self.signing_key is not None:
            raise ValueError('option signing_key: nothing is checked: set signatures = "check" or "require"')
        if self.signatures != "off" and self.digests == "off":
            raise ValueError(f"option signatures {self.signatures}: needs digests: leave out --digests off")
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
DECLARATIONS = {name: declaration(field) for name, field in MountOptions.model_fields.items()}
SCALARS = tuple(
    name for heading in HEADINGS for name, own in DECLARATIONS.items() if own.heading == heading and name not in TABLES
)
"""The options that variables can set too, in the order of their headings."""
FLAGS = tuple(name for name in SCALARS if DECLARATIONS[name].flag)
"""The options that the command line accepts too."""


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
