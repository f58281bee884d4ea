"""What can go wrong between a program and a copy in a device's memory.

::

    GpuError               the copy cannot be had
    ├── GpuFullError       the device has no room for it
    └── GpuLostError       it was there, and is no more

Messages are one line: the thing, the cause and, where there is one, the remedy.
"""


class GpuError(Exception):
    """A model cannot be had in a device's memory."""


class GpuFullError(GpuError):
    """The device has no room for a model beside what is in use there."""


class GpuLostError(GpuError):
    """A model that was had in a device's memory is not there any more, or nothing keeps it there."""
