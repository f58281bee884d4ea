"""The MXNet adapter: MXNet's own loaders map models from a mount and copy nothing."""

import importlib


def install() -> None:
    """Have MXNet load without a copy from now on, in this process. A second call does nothing.

    Raises ImportError without MXNet, and OSError without the library of what is in C.
    """
    importlib.import_module("trimsfs.client.mxnet.load").install()
