"""Models of an object store as ordinary files, one shared copy per host.

``trimsfs.open`` and its errors are those of ``trimsfs.client``, imported on first use.
"""

__all__ = ["FormatError", "GpuError", "GpuFullError", "GpuLostError", "__version__", "open"]

__version__ = "0.2.0"

TYPE_CHECKING = False  # type checkers take it as true; `import typing` would take time
if TYPE_CHECKING:
    from trimsfs.client import (
        FormatError,
        GpuError,
        GpuFullError,
        GpuLostError,
        open,  # noqa: A004 - as zarr.open() and Image.open()
    )
else:

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    def __getattr__(name: str) -> object:
        if name in __all__:
            import trimsfs.client  # noqa: PLC0415

            return getattr(trimsfs.client, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
