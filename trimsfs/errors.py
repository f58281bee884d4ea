"""What can go wrong, independent of FUSE and of any vendor's library.

::

    TrimsError
    ├── ConfigurationError         an option that cannot be used
    ├── CommandNotFoundError       there is no such program to run
    ├── CommandNotRunnableError    a program that cannot be run
    ├── FuseUnavailableError       the host cannot mount FUSE file systems
    ├── MountpointError            the directory cannot be mounted on
    ├── TakeoverError              a mount that another server has begun and this one cannot go on with
    ├── NotMountedError            there is no trimsfs mount at a path
    ├── CacheError
    │   ├── CacheInUseError        another server holds the cache directory
    │   ├── CacheUnusableError     the cache directory cannot be used
    │   ├── CacheFullError         no room is left and nothing can be evicted
    │   └── BlobDamagedError       a local copy that is not what the store has
    ├── NoSuchEntryError           a name that does not exist
    │   └── NameTooLongError       a name that no file can have
    ├── LookUpAgainError           a name that leads to another inode by now
    ├── NotPermittedError          a command the caller may not give
    ├── SignatureError             a file that has not been signed, or differs from what has
    ├── InUseError                 a command on a file that is open
    ├── InvalidRequestError        a request that makes no sense
    ├── DeviceError                a GPU that cannot be used
    │   ├── DeviceFullError        no memory of a GPU is left and nothing can be evicted
    │   └── CopyDamagedError       a copy on a GPU that is not what its file is
    └── StoreError
        ├── BucketNotFoundError    the bucket or directory does not exist
        ├── ObjectNotFoundError    the store said that the object does not exist
        ├── ObjectChangedError     the object is no longer the generation asked for
        ├── StoreAccessError       the credentials are missing, wrong or not enough
        ├── TransientStoreError    may succeed when tried again
        │   ├── StoreThrottledError    the store asked for fewer requests
        │   └── StoreStalledError      no bytes came in time
        └── StoreUnavailableError  still failing after the retries

Messages are one line: the thing, the cause and, where there is one, the remedy. ``trimsfs.fuse.errnos``
maps them to errno values, ``trimsfs.cli.output`` to exit codes.
"""

from typing import Self


class TrimsError(Exception):
    """Base of every error that trimsfs raises on purpose."""


class ConfigurationError(TrimsError):
    """An option has a value that cannot be used."""


class CommandNotFoundError(TrimsError):
    """There is no such program to run."""


class CommandNotRunnableError(TrimsError):
    """A program that cannot be run."""


class FuseUnavailableError(TrimsError):
    """The host or the user cannot mount FUSE file systems."""


class MountpointError(TrimsError):
    """The mount point is missing, in use, or not empty."""


class TakeoverError(TrimsError):
    """What an earlier server has left of a mount cannot be used by this one."""


class NotMountedError(TrimsError):
    """No trimsfs mount answers at a path."""


class CacheError(TrimsError):
    """Base of the errors of the cache directory."""


class CacheInUseError(CacheError):
    """Another server holds the lock of the cache directory."""


class CacheUnusableError(CacheError):
    """The cache directory cannot be created, locked or written."""


class CacheFullError(CacheError):
    """The cache has no room and nothing in it may be evicted."""


class BlobDamagedError(CacheError):
    """A local copy was not, or is not, what the store has."""


class NoSuchEntryError(TrimsError):
    """A name that does not exist, as far as the store says."""


class NameTooLongError(NoSuchEntryError):
    """A name that is longer than that of a file can be."""


class LookUpAgainError(TrimsError):
    """The inode is no longer what its name leads to; the kernel, told so, looks the name up and tries again."""


class NotPermittedError(TrimsError):
    """The caller may not give this command."""


class SignatureError(TrimsError):
    """A file that may not be opened: it has not been signed, or is not what has."""

    @classmethod
    def other_content(cls, key: str) -> Self:
        """The error of a file of which other bytes have been signed."""
        return cls(f"{key}: digest differs from the signed one: check who can write to the store")


class InUseError(TrimsError):
    """The command needs a file that nobody has open."""


class InvalidRequestError(TrimsError):
    """A request whose arguments cannot be right."""


class DeviceError(TrimsError):
    """A GPU that is not there, or has failed."""


class DeviceFullError(DeviceError):
    """A GPU has no room for a copy, and nothing on it may be evicted."""


class CopyDamagedError(DeviceError):
    """A copy on a GPU is not, or no longer, what its file is."""


class StoreError(TrimsError):
    """Base of the errors of a store."""


class BucketNotFoundError(StoreError):
    """The bucket, or the directory of a directory store, does not exist."""


class ObjectNotFoundError(StoreError):
    """The store said that there is no such object."""


class ObjectChangedError(StoreError):
    """The store holds another generation of the object than the one asked for."""


class StoreAccessError(StoreError):
    """The store refused the credentials, or there are none."""


class TransientStoreError(StoreError):
    """The request failed in a way that another attempt may cure."""


class StoreThrottledError(TransientStoreError):
    """The store asked for fewer requests."""


class StoreStalledError(TransientStoreError):
    """The store sent no bytes, or too few, for too long."""


class StoreUnavailableError(StoreError):
    """The request kept failing until the retries were used up."""
