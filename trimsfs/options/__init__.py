"""The options of a mount: their schema, and the file, environment and command line that they are read from."""

from trimsfs.options.eviction import Eviction
from trimsfs.options.fleet_options import FLEET_DIRECTORY, FLEET_REPORTS, FLEET_SOCKET, FLEET_USER, FLEET_USERS_REMEDY
from trimsfs.options.places import Place, directories, places
from trimsfs.options.schema import (
    FLAGS,
    GPU_OFF,
    SCALARS,
    AccessRule,
    MountOptions,
    Tenant,
    default_store,
    default_user,
    flag,
    searchable,
)
from trimsfs.options.sources import (
    DEFAULT_CONFIG,
    ENVIRONMENT_PREFIX,
    FORMER,
    MOUNTPOINT,
    declared_mountpoint,
    keeper_order,
    load_options,
)
from trimsfs.options.store_settings import SEVERAL, StoreTable

__all__ = [
    "DEFAULT_CONFIG",
    "ENVIRONMENT_PREFIX",
    "FLAGS",
    "FLEET_DIRECTORY",
    "FLEET_REPORTS",
    "FLEET_SOCKET",
    "FLEET_USER",
    "FLEET_USERS_REMEDY",
    "FORMER",
    "GPU_OFF",
    "MOUNTPOINT",
    "SCALARS",
    "SEVERAL",
    "AccessRule",
    "Eviction",
    "MountOptions",
    "Place",
    "StoreTable",
    "Tenant",
    "declared_mountpoint",
    "default_store",
    "default_user",
    "directories",
    "flag",
    "keeper_order",
    "load_options",
    "places",
    "searchable",
]
