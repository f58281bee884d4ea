"""The one table from errors to the errno values that programs see."""

import errno

from trimsfs.errors import (
    CacheError,
    CacheFullError,
    DeviceError,
    DeviceFullError,
    InUseError,
    InvalidRequestError,
    NameTooLongError,
    NoSuchEntryError,
    NotPermittedError,
    ObjectChangedError,
    ObjectNotFoundError,
    SignatureError,
    StaleHandleError,
    StoreAccessError,
    StoreError,
)

_TABLE: tuple[tuple[type[Exception], int], ...] = (
    # The first entry that matches an error wins.
    (NameTooLongError, errno.ENAMETOOLONG),
    (NoSuchEntryError, errno.ENOENT),
    (NotPermittedError, errno.EPERM),
    (InUseError, errno.EBUSY),
    (InvalidRequestError, errno.EINVAL),
    (StaleHandleError, errno.ESTALE),
    (ObjectNotFoundError, errno.ESTALE),
    (ObjectChangedError, errno.ESTALE),
    (SignatureError, errno.EACCES),
    (StoreAccessError, errno.EACCES),
    (StoreError, errno.EIO),
    (CacheFullError, errno.ENOSPC),
    (CacheError, errno.EIO),
    (DeviceFullError, errno.ENOMEM),
    (DeviceError, errno.EIO),
    (IsADirectoryError, errno.EISDIR),
    (InterruptedError, errno.EINTR),
)


def errno_of(error: Exception) -> int:
    """The errno of an error; EIO for one that is not in the table, which is a defect."""
    for kind, number in _TABLE:
        if isinstance(error, kind):
            return number
    return errno.EIO
