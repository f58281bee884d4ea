"""What callers of the mount see of an error."""

import errno

import pytest

from trimsfs import errors
from trimsfs.fuse.errnos import errno_of


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (errors.NoSuchEntryError("a"), errno.ENOENT),
        (errors.NameTooLongError("a"), errno.ENAMETOOLONG),
        (errors.NotPermittedError("a"), errno.EPERM),
        (errors.InUseError("a"), errno.EBUSY),
        (errors.InvalidRequestError("a"), errno.EINVAL),
        (errors.ObjectChangedError("a"), errno.ESTALE),
        (errors.StaleHandleError("a"), errno.ESTALE),
        (errors.ObjectNotFoundError("a"), errno.ESTALE),
        (errors.StoreAccessError("a"), errno.EACCES),
        (errors.SignatureError("a"), errno.EACCES),
        (errors.BlobDamagedError("a"), errno.EIO),
        (errors.StoreUnavailableError("a"), errno.EIO),
        (errors.TransientStoreError("a"), errno.EIO),
        (errors.BucketNotFoundError("a"), errno.EIO),
        (errors.CacheUnusableError("a"), errno.EIO),
        (errors.CacheFullError("a"), errno.ENOSPC),
        (errors.DeviceError("a"), errno.EIO),
        (errors.DeviceFullError("a"), errno.ENOMEM),
        (errors.CopyDamagedError("a"), errno.EIO),
        (IsADirectoryError("a"), errno.EISDIR),
        (InterruptedError(), errno.EINTR),
        (RuntimeError("a defect"), errno.EIO),
    ],
)
def test_each_error_has_the_errno_that_callers_expect(error: Exception, number: int) -> None:
    assert errno_of(error) == number
