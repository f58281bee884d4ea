"""What the SDK knows of services and endpoints, cut down to what a store needs: all of it takes 12 MiB."""

import functools
import gc
import json
from typing import Any

from botocore.loaders import Loader, create_loader
from botocore.session import Session

SERVICES = frozenset({"s3", "sts", "sso", "oidc", "portal.sso", "signin"})
"""Where models are, and what credentials come from."""
OPERATIONS = ("ListObjectsV2", "GetObject", "HeadObject", "HeadBucket", "CreateSession")
"""What a store asks for, and what the SDK asks for a bucket's region or a session of S3 Express."""


def use_less(session: Session) -> None:
    """Have a new session keep only the data that a store needs."""
    session.register_component("data_loader", _CuttingLoader(session.get_config_variable("data_path")))


class _CuttingLoader(Loader):
    def __init__(self, path: str | None) -> None:
        everything = create_loader(path)
        super().__init__(extra_search_paths=list(everything.search_paths), include_default_search_paths=False)
        self._path = path

    def load_data_with_path(self, name: str) -> Any:
        if name == "endpoints":
            endpoints, _, place = _cut(self._path)
            return endpoints, place
        return _data(self._path, name)

    def load_service_model(self, service_name: str, type_name: str, api_version: str | None = None) -> Any:
        if (service_name, type_name) == ("s3", "service-2"):
            return _cut(self._path)[1]
        if api_version is None:
            return _model(self._path, service_name, type_name)
        return super().load_service_model(service_name, type_name, api_version)


@functools.cache
def _data(path: str | None, name: str) -> Any:
    """Data once for all sessions: a mount has one for each store, and for each tenant with credentials."""
    return create_loader(path).load_data_with_path(name)


@functools.cache
def _model(path: str | None, service_name: str, type_name: str) -> Any:
    """As `_data`, of a service."""
    return create_loader(path).load_service_model(service_name, type_name)


@functools.cache
def _cut(path: str | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Of the data at a path of the SDK's, or its own: endpoints, the model of S3, and where the endpoints are."""
    loader = create_loader(path)
    endpoints, place = loader.load_data_with_path("endpoints")
    for partition in endpoints["partitions"]:
        services = partition["services"]
        partition["services"] = {name: services[name] for name in services.keys() & SERVICES}
    model = loader.load_service_model("s3", "service-2")
    operations = {name: model["operations"][name] for name in OPERATIONS}
    model |= {"operations": operations, "shapes": _shapes(operations, model["shapes"])}
    text = json.dumps([endpoints, model])
    del loader, endpoints, services, partition, model, operations
    gc.collect()  # before anything is put between what is left
    endpoints, model = json.loads(text)
    return endpoints, model, place


def _shapes(operations: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """The shapes that operations refer to, directly or not."""
    referenced: dict[str, Any] = {}
    left: list[Any] = [operations]
    while left:
        match left.pop():
            case {"shape": str(name), **rest}:
                left += rest.values()
                if name not in referenced:
                    referenced[name] = shapes[name]
                    left.append(shapes[name])
            case dict(fields):
                left += fields.values()
            case [*items]:
                left += items
    return referenced
