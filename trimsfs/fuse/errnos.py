"""The one table from errors to the errno values that programs see."""

import errno

from trimsfs import errors

_TABLE: tuple[tuple[type[Exception], int], ...] = (
    # The first entry that matches an error wins.
    (errors.NameTooLongError, errno.ENAMETOOLONG),
    (errors.NoSuchEntryError, errno.ENOENT),
    (errors.NotPermittedError, errno.EPERM),
    (errors.InUseError, errno.EBUSY),
    (errors.InvalidRequestError, errno.EINVAL),
    (errors.StaleHandleError, errno.ESTALE),
    (errors.ObjectNotFoundError, errno.ESTALE),
    (errors.ObjectChangedError, errno.ESTALE),
    (errors.SignatureError, errno.EACCES),
    (errors.StoreAccessError, errno.EACCES),
    (errors.StoreError, errno.EIO),
    (errors.CacheFullError, errno.ENOSPC),
    (errors.CacheError, errno.EIO),
    (errors.DeviceFullError, errno.ENOMEM),
    (errors.DeviceError, errno.EIO),
    (IsADirectoryError, errno.EISDIR),
    (InterruptedError, errno.EINTR),
)


def errno_of(error: Exception) -> int:
    """The errno of an error; EIO for one that is not in the table, which is a defect."""
    return next((number for kind, number in _TABLE if isinstance(error, kind)), errno.EIO)
