"""The Identity service of CSI: the name and version of the driver, and whether its mounts answer."""

import logging
from concurrent.futures import ThreadPoolExecutor

from google.protobuf.wrappers_pb2 import BoolValue

import trimsfs
from mountctl.extras.csi import DRIVER_NAME, csi_pb2
from mountctl.extras.csi.mount_commands import MountCommands
from mountctl.extras.csi.mounts_directory import MountsDirectory
from mountctl.extras.csi.status_errors import StatusError

log = logging.getLogger(__name__)


class IdentityService:
    """The calls of the service. All raise StatusError."""

    def __init__(self, *, mounts: MountsDirectory, children: MountCommands) -> None:
        self._mounts = mounts
        self._children = children

    def get_plugin_info(self, _: csi_pb2.GetPluginInfoRequest) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=DRIVER_NAME, vendor_version=trimsfs.__version__)

    def get_plugin_capabilities(self, _: csi_pb2.GetPluginCapabilitiesRequest) -> csi_pb2.GetPluginCapabilitiesResponse:
        """No capabilities beyond the Node service: the driver neither creates nor attaches volumes."""
        return csi_pb2.GetPluginCapabilitiesResponse()

    def probe(self, _: csi_pb2.ProbeRequest) -> csi_pb2.ProbeResponse:
        """Ready if there is a mount and every mount answers."""
        names = self._mounts.names()
        problems = [f"there is no mount in {self._mounts.path}"] if not names else []
        with ThreadPoolExecutor(max_workers=len(names) or 1) as threads:
            problems += filter(None, threads.map(self._problem, names))
        for problem in problems:
            log.warning("not ready: %s", problem)
        return csi_pb2.ProbeResponse(ready=BoolValue(value=not problems))

    def _problem(self, name: str) -> str | None:
        try:
            self._children.check_answers(self._mounts.find(name))
        except StatusError as error:
            return str(error)
        return None
