"""Quotas: each tenant's share of a tier, and the rest for models of no tenant."""

from collections.abc import Mapping

REST = ""
"""The pool of models that belong to no tenant."""


class Quotas:
    """The shares of tenants in bytes, by directory with its trailing slash; None for a tenant without a share.

    A share is both limit and guarantee: a load evicts entries of its own tenant or of none, never of another tenant.
    """

    def __init__(self, shares: Mapping[str, int | None] | None = None) -> None:
        self._shares = {prefix: share for prefix, share in (shares or {}).items() if share is not None}
        self._longest_first = sorted(self._shares, key=len, reverse=True)

    @property
    def any(self) -> bool:
        """Whether any tenant has a share."""
        return bool(self._shares)

    def pools(self) -> list[str]:
        """The pools of a tier: one per tenant with a share, and REST."""
        return [*self._shares, REST]

    def pool(self, key: str) -> str:
        """The pool that an object's bytes count in."""
        return next((prefix for prefix in self._longest_first if key.startswith(prefix)), REST)

    def full(self, key: str, option: str) -> str | None:
        """The error message that the share of an object's tenant is full; None for an object of no tenant.

        *option* is the option that sets the share.
        """
        pool = self.pool(key)
        if pool == REST:
            return None
        tenant, share = pool.removesuffix("/"), self._shares[pool] or 0
        size = f"{share >> 20} MiB" if share >= 1 << 20 else f"{share} bytes"
        return f"tenant {tenant} is full ({option} {size}): evict or unpin its models, or raise it"

    def limit(self, pool: str, total: int | None) -> int | None:
        """The limit of a pool in bytes, in a tier of at most *total* bytes; None if unlimited."""
        if pool != REST:
            return self._shares[pool]
        return None if total is None else max(0, total - sum(self._shares.values()))
