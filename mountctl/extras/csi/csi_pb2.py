"""The messages of ``csi.proto``, made at run time from ``csi.binpb``, the descriptor that protoc wrote.

Python code from protoc works with at most two major versions of protobuf: its own and the next. The descriptor works
with all versions, and the driver's host needs no compiler. protoc also wrote ``csi_pb2.pyi``; `make protocol` writes
both, and a test compares them with ``csi.proto``.
"""

from pathlib import Path

from google.protobuf import (
    descriptor,
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    wrappers_pb2,  # noqa: F401 - csi.proto needs it in the pool
)
from google.protobuf.message import Message

_FILES = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("csi.binpb").read_bytes())
_POOL = descriptor_pool.Default()
_POOL.AddSerializedFile(_FILES.file[0].SerializeToString())

DESCRIPTOR = _POOL.FindFileByName(_FILES.file[0].name)


def _class(message: descriptor.Descriptor) -> type[Message]:
    """The class of a message, with its nested messages' classes, which not every implementation of protobuf adds."""
    made = message_factory.GetMessageClass(message)
    for nested in message.nested_types:
        if not hasattr(made, nested.name):
            setattr(made, nested.name, _class(nested))
    return made


globals().update({name: _class(message) for name, message in DESCRIPTOR.message_types_by_name.items()})
