"""The exceptions of trimsfs, independent of FUSE and of any vendor's library.

Messages are one line: the subject, the cause and, where there is one, the remedy. ``trimsfs.fuse.errnos``
maps them to errno values, ``trimsfs.exit_codes`` to exit codes.
"""

from typing import Self


class TrimsError(Exception):
    """The base of every error that trimsfs raises on purpose."""


class ConfigurationError(TrimsError):
    """An option has an invalid value."""


class CommandNotFoundError(TrimsError):
    """The program to run does not exist."""


class CommandNotRunnableError(TrimsError):
    """The program to run cannot be executed."""


class FuseUnavailableError(TrimsError):
    """The host or the user cannot mount FUSE file systems."""


class MountpointError(TrimsError):
    """The mount point is missing, in use, or not empty."""


class TakeoverError(TrimsError):
    """This server cannot take over a mount from an earlier server."""


class NotMountedError(TrimsError):
    """No trimsfs mount answers at a path."""


class NoAnswerError(TrimsError):
    """A mount, or a container's file system, does not answer in time."""


class EngineError(TrimsError):
    """No container engine is installed, or it failed."""


class CacheError(TrimsError):
    """The base of the errors of the cache directory."""


class CacheInUseError(CacheError):
    """Another server holds the lock of the cache directory."""


class CacheUnusableError(CacheError):
    """The cache directory cannot be created, locked or written."""


class CacheFullError(CacheError):
    """The cache is full, and nothing in it may be evicted."""


class BlobDamagedError(CacheError):
    """A local copy differs, or differed, from the store."""


class NoSuchEntryError(TrimsError):
    """The name does not exist, according to the store."""


class NameTooLongError(NoSuchEntryError):
    """The name is too long for a file."""


class StaleHandleError(TrimsError):
    """What the handle was opened for ended with an earlier server: open it again."""


class NotPermittedError(TrimsError):
    """The caller lacks permission for the command."""


class SignatureError(TrimsError):
    """The file must not be opened: it is unsigned, or does not match its signature."""

    @classmethod
    def other_content(cls, key: str) -> Self:
        """A SignatureError for a file that does not match its signature."""
        return cls(f"{key}: digest differs from the signed one: check who can write to the store")


class VersionConflictError(TrimsError):
    """A version or alias in the store is not as a publisher expects it, or somebody else has changed it meanwhile."""


class InUseError(TrimsError):
    """The command needs a file that nobody uses. ``key`` names a file that programs may have open, if it is known."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class InvalidRequestError(TrimsError):
    """The request has invalid arguments."""


class DeviceError(TrimsError):
    """The GPU is missing, or has failed."""


class DeviceFullError(DeviceError):
    """The GPU has no room for a copy, and nothing on it may be evicted."""


class CopyDamagedError(DeviceError):
    """A copy on a GPU differs from its file."""


class StoreError(TrimsError):
    """The base of the errors of a store."""


class BucketNotFoundError(StoreError):
    """The bucket, or the directory of a directory store, does not exist."""


class ObjectNotFoundError(StoreError):
    """The store reported that the object does not exist."""


class ObjectChangedError(StoreError):
    """The store now has another generation of the object."""


class StoreAccessError(StoreError):
    """The store refused the credentials, or there are none."""


class TransientStoreError(StoreError):
    """The request failed, but a retry may succeed."""


class WorkerLostError(TransientStoreError):
    """The fetch process that made the request died or did not answer, which says nothing of the store."""


class NoThreadError(WorkerLostError):
    """No thread could be started to do the work, which says nothing of the store, or of a file."""


class StoreNotTrustedError(TransientStoreError):
    """The store's certificate cannot be verified. The message has the remedy, which is not the network's."""


class StoreUnclearError(TransientStoreError):
    """The store's answer does not tell whether it refuses or fails for now: that to HEAD has no body."""


class StoreThrottledError(TransientStoreError):
    """The store throttles requests."""


class StoreStalledError(TransientStoreError):
    """The store sent no bytes, or too few, in time."""


class StoreSlowError(StoreStalledError):
    """The store has sent a part of an answer, then too little: another request may bring the bytes sooner."""


class StoreUnavailableError(StoreError):
    """The store cannot serve the request, even after retries."""
