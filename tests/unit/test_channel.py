"""The channel between two processes of a mount, of which one may be anybody's."""

import array
import os
import socket

import pytest

from trimsfs.concurrency.channel import Channel, ChannelClosedError, pair


@pytest.mark.parametrize("data", [b"", b"no JSON"])
async def test_descriptors_of_what_is_no_message_are_closed(data: bytes) -> None:
    ours, theirs = pair()
    read, write = os.pipe()
    with ours, theirs:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))]
        theirs.sendmsg([data], rights)
        os.close(write)
        with pytest.raises(ChannelClosedError):
            await Channel(ours).receive()
        assert os.read(read, 1) == b"", "nobody has the other end any more"
    os.close(read)
