"""What the emulated driver's library and its kernel driver have in common, as emulated.h lays it out."""

import ctypes
import enum

VERSION = 1
DEVICES_LIMIT = 16
HANDLE_SIZE = 64
GRANULARITY = 2 << 20


class Verb(enum.IntEnum):
    """What a process asks of the kernel driver."""

    HELLO = 1
    INFO = 2
    ALLOCATE = 3
    CREATE = 4
    DROP = 5
    EXPORT = 6
    IMPORT = 7
    IPC_GET = 8
    IPC_OPEN = 9


class Result(enum.IntEnum):
    """Those of CUDA's errors that the kernel driver gives."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    DEVICE_UNAVAILABLE = 46
    INVALID_DEVICE = 101
    INVALID_CONTEXT = 201
    PEER_ACCESS_UNSUPPORTED = 217
    UNKNOWN = 999


class DeviceRegisters(ctypes.Structure):
    """What all processes see of a device; `lost` and what follows is set by tests, the counts are of the library's."""

    _fields_ = (
        ("uuid", ctypes.c_ubyte * 16),
        ("name", ctypes.c_char * 64),
        ("total", ctypes.c_uint64),
        ("lost", ctypes.c_uint32),
        ("paused", ctypes.c_uint32),
        ("ns_per_copy", ctypes.c_uint64),
        ("ps_per_byte", ctypes.c_uint64),
        ("copies", ctypes.c_uint64),
        ("bytes_to_device", ctypes.c_uint64),
        ("bytes_to_host", ctypes.c_uint64),
        ("bytes_within", ctypes.c_uint64),
    )


class Registers(ctypes.Structure):
    """A page that every process maps."""

    _fields_ = (
        ("version", ctypes.c_uint64),
        ("devices", ctypes.c_uint64),
        ("device", DeviceRegisters * DEVICES_LIMIT),
    )


class Message(ctypes.Structure):
    """A question, or its answer, in which `what` is a Result."""

    _fields_ = (
        ("what", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("number", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("more", ctypes.c_uint64),
        ("handle", ctypes.c_ubyte * HANDLE_SIZE),
    )
