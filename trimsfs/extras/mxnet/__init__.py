"""The MXNet adapter: MXNet's own loaders and executors map models from a mount and copy nothing."""


def install() -> None:
    """Have MXNet map what it loads from mounts from now on, in this process. A second call does nothing.

    Raises ImportError without MXNet, and OSError without the native library.
    """
    from trimsfs.extras.mxnet import executors, load  # noqa: PLC0415 - both import MXNet

    if not load.installed():
        load.install()
        executors.install()
