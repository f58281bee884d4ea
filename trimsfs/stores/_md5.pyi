"""MD5 of several messages of one length side by side; ``_md5.c`` says what that gains."""

from typing import Final

from trimsfs.types import Buffer

LANES: Final[int]
"""How many messages."""

def update(state: bytearray, data: Buffer, /) -> None:
    """Add to the states of all messages the next bytes of each, a multiple of 64, without the GIL.

    *state* holds the four 32-bit words of MD5, each for all messages. *data* is the same number of bytes of every
    message, one message after the other. Raises ValueError for another size of either.
    """
