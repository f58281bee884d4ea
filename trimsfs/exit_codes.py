"""The table from errors to exit codes, for the command line and the server process."""

from trimsfs import errors

UNEXPECTED = 1
EXIT_CODES: dict[str, int] = {
    errors.ConfigurationError.__name__: 2,
    errors.InvalidRequestError.__name__: 2,
    errors.FuseUnavailableError.__name__: 3,
    errors.MountpointError.__name__: 4,
    errors.BucketNotFoundError.__name__: 5,
    errors.StoreAccessError.__name__: 6,
    errors.StoreUnavailableError.__name__: 7,
    errors.CacheInUseError.__name__: 8,
    errors.CacheUnusableError.__name__: 9,
    errors.CacheFullError.__name__: 9,
    errors.NotMountedError.__name__: 10,
    errors.NotPermittedError.__name__: 11,
    errors.InUseError.__name__: 12,
    errors.NoSuchEntryError.__name__: 13,
    errors.ObjectChangedError.__name__: 14,
    errors.DeviceError.__name__: 15,
    errors.EngineError.__name__: 15,
    errors.DeviceFullError.__name__: 16,
    errors.NoAnswerError.__name__: 16,
    errors.CopyDamagedError.__name__: 17,
    errors.BlobDamagedError.__name__: 18,
    errors.SignatureError.__name__: 19,
    errors.VersionConflictError.__name__: 20,
    errors.CommandNotRunnableError.__name__: 126,
    errors.CommandNotFoundError.__name__: 127,
    KeyboardInterrupt.__name__: 130,
}
"""Keyed by the name of the error's class, which servers and control files send."""


def exit_code(kind: str) -> int:
    """The exit code of an error class, given by name."""
    return EXIT_CODES.get(kind, UNEXPECTED)
