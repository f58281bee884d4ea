"""Places: the paths of a mount at which stores are, and those at which tenants have credentials of their own."""

from dataclasses import dataclass

from trimsfs.errors import ConfigurationError
from trimsfs.options.schema import MountOptions, Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A *path*, with its closing slash, and the *options* of the store there; *base* is the path of that store.

    The path is empty for all of the mount. Keys of the store begin behind the base. The options are those of a mount of
    the store alone. *tenant* is whose credentials they have, or None if they are the operator's.
    """

    path: str
    base: str
    options: MountOptions
    tenant: Tenant | None = None

    @property
    def table(self) -> str:
        """The table that the place is from, to begin a message with; empty if it is the mount itself."""
        return f"[[{'store' if self.tenant is None else 'tenants'}]] path {self.path[:-1]}: " if self.path else ""


def places(options: MountOptions) -> list[Place]:
    """The places of a mount. Raises ConfigurationError for a tenant whose credentials are of no use."""
    tenants = {f"{tenant.path}/": tenant for tenant in options.tenants if tenant.has_credentials}
    all_places, used = list[Place](), set[str]()
    for base, own in options.each_store():
        above = max((path for path in tenants if base.startswith(path)), key=len, default=None)
        below = [path for path in tenants if path.startswith(base) and path != base]
        used |= {*below, *([] if above is None else [above])}
        all_places += [_place(base, base, own, None if above is None else tenants[above])]
        all_places += [_place(path, base, own, tenants[path]) for path in below]
    for path in tenants.keys() - used:
        raise ConfigurationError(f"[[tenants]] path {path[:-1]}: has credentials, but no store is there")
    return all_places


def directories(options: MountOptions) -> list[str]:
    """The stores of a mount that are directories."""
    stores = [own.store or "" for _, own in options.each_store()]
    return [store for store in stores if "://" not in store or store.startswith("file://")]


def _place(path: str, base: str, own: MountOptions, tenant: Tenant | None) -> Place:
    own = own.model_copy(update={"tenants": ()})
    if tenant is None:
        return Place(path=path, base=base, options=own)
    if not (own.store or "").startswith("s3://"):
        raise ConfigurationError(
            f"[[tenants]] path {tenant.path}: has credentials, and {own.store} takes none: S3 does"
        )
    if tenant.share_cache and own.signatures != "off":
        raise ConfigurationError(f"[[tenants]] path {tenant.path}: share_cache: not with signatures")
    credentials = {
        "profile": tenant.profile or own.profile,  # of a role, the source of its credentials
        "role_arn": tenant.role_arn,
        "web_identity_token_file": tenant.web_identity_token_file,
        "anonymous": False,
    }
    return Place(path=path, base=base, options=own.model_copy(update=credentials), tenant=tenant)
