"""The errors of models in a device's memory.

::

    GpuError               the copy cannot be loaded or mapped
    ├── GpuFullError       the device has no room for it
    └── GpuLostError       this process had leased it, and lost it

A message is one line: the subject, the cause and, if there is one, the remedy.
"""


class GpuError(Exception):
    """A model cannot be loaded to a device, or its copy cannot be mapped."""


class GpuFullError(GpuError):
    """The device has no room for a copy beside those in use."""


class GpuLostError(GpuError):
    """This process has lost the lease of a copy, or the copy itself."""
