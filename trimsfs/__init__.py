"""Models of an object store as ordinary files, one shared copy per host.

``trimsfs.open`` is ``trimsfs.client.open``, which is imported when it is asked for, and so is ``FormatError``.
"""

__all__ = ["FormatError", "__version__", "open"]

__version__ = "0.1.0.dev0"

TYPE_CHECKING = False  # type checkers take it as true; importing it would take time
if TYPE_CHECKING:
    from trimsfs.client import FormatError, open  # noqa: A004 - as zarr.open() and Image.open()
else:

    def __getattr__(name: str) -> object:
        if name in {"FormatError", "open"}:
            import trimsfs.client  # noqa: PLC0415

            return getattr(trimsfs.client, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
