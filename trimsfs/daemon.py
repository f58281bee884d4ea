"""What a keeper starts as ``python -m trimsfs.daemon``: a server. Keepers of other versions rely on this name."""

import gc

gc.disable()  # all that a start brings stays: looking through it again and again is a fifth of the start's time

from trimsfs.server.daemon import main  # noqa: E402

if __name__ == "__main__":
    main()
