"""The messages of ``csi.proto``, made at run time from ``csi.binpb``, its descriptor as protoc writes it.

Python code that protoc writes works with two major versions of protobuf at most, the one that wrote it and the next.
The descriptor works with all, and no compiler is needed where the driver is installed. ``csi_pb2.pyi`` is protoc's;
`make protocol` writes both, and a test compares them with ``csi.proto``.
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
    """The class of a message, with those of the messages in it: not every implementation of protobuf adds them."""
    made = message_factory.GetMessageClass(message)
    for nested in message.nested_types:
        if not hasattr(made, nested.name):
            setattr(made, nested.name, _class(nested))
    return made


globals().update({name: _class(message) for name, message in DESCRIPTOR.message_types_by_name.items()})
