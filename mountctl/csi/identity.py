"""The Identity service: what the driver is, and whether its mounts answer."""

import logging
from concurrent.futures import ThreadPoolExecutor

from google.protobuf.wrappers_pb2 import BoolValue

import trimsfs
from mountctl.csi import DRIVER_NAME, csi_pb2
from mountctl.csi.children import Children
from mountctl.csi.refusals import RefusedError
from mountctl.csi.sources import Sources

log = logging.getLogger(__name__)


class Identity:
    """The calls of the service. All raise RefusedError."""

    def __init__(self, *, sources: Sources, children: Children) -> None:
        self._sources = sources
        self._children = children

    def get_plugin_info(self, _: csi_pb2.GetPluginInfoRequest) -> csi_pb2.GetPluginInfoResponse:
        """Name and version."""
        return csi_pb2.GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=trimsfs.__version__)

    def get_plugin_capabilities(self, _: csi_pb2.GetPluginCapabilitiesRequest) -> csi_pb2.GetPluginCapabilitiesResponse:
        """Nothing beyond the Node service: volumes are neither created nor attached."""
        return csi_pb2.GetPluginCapabilitiesResponse()

    def probe(self, _: csi_pb2.ProbeRequest) -> csi_pb2.ProbeResponse:
        """Ready means that there is a mount and that all answer."""
        names = self._sources.names()
        problems = [f"no mount is in {self._sources.directory}"] if not names else []
        with ThreadPoolExecutor(max_workers=len(names) or 1) as threads:
            problems += filter(None, threads.map(self._problem, names))
        for problem in problems:
            log.warning("not ready: %s", problem)
        return csi_pb2.ProbeResponse(ready=BoolValue(value=not problems))

    def _problem(self, name: str) -> str | None:
        try:
            self._children.check_answers(self._sources.find(name))
        except RefusedError as error:
            return str(error)
        return None
