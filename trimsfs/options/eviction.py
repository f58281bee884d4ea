"""The option ``eviction``: one policy for all tiers, or one for each."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from trimsfs.eviction_policies import NAMES, policy_named


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{name} is no eviction policy: write {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    policy_named(name)  # once a server has dropped root, the file of an extra may be unreadable
    return name


PolicyName = Annotated[str, AfterValidator(_known)]


class Eviction(BaseModel):
    """The eviction policy of each tier: the disk cache, the host's memory, the GPUs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    disk: PolicyName = "lru"
    host: PolicyName = "lru"
    gpu: PolicyName = "lru"


TIERS = tuple(Eviction.model_fields)


def by_tier(value: object) -> dict[str, object]:
    """The policies that are written, by tier: one for all, ``disk=eager,gpu=never``, or a table of the file with these.

    Raises ValueError.
    """
    if isinstance(value, str):
        value = (
            dict(part.strip().partition("=")[::2] for part in value.split(","))
            if "=" in value
            else dict.fromkeys(TIERS, value)
        )
    if isinstance(value, dict):
        for tier in value.keys() - set(TIERS):
            raise ValueError(f"{tier} is no tier: write POLICY, or TIER=POLICY of {', '.join(TIERS)}")
        return value
    if isinstance(value, Eviction):
        return value.model_dump()
    raise ValueError('must be a policy, such as "lru", or a table, such as { disk = "lru", gpu = "never" }')


EvictionOption = Annotated[Eviction, BeforeValidator(by_tier)]
