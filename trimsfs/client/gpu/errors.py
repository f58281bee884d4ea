"""The errors of models in a device's memory.

::

    GpuError               the copy cannot be loaded or mapped
    ├── GpuFullError       the device has no room for it
    └── GpuLostError       it was mapped, and has been lost

Messages are one line: the subject, the cause and, where there is one, the remedy.
"""


class GpuError(Exception):
    """A model cannot be loaded to a device, or its copy cannot be mapped."""


class GpuFullError(GpuError):
    """The device has no room for a copy beside those in use."""


class GpuLostError(GpuError):
    """A copy that this process leased is lost, or its lease is."""
