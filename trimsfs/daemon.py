"""What a keeper starts as ``python -m trimsfs.daemon``: a server. Keepers of other versions rely on this name."""

import gc
import os

if __name__ == "__main__":
    gc.disable()  # all that a start brings stays: to look through it again and again is a fifth of the start's time
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # it would read the metadata of all that is installed

    from trimsfs.server.daemon import main

    main()
    # What it knows, of a million names some 900 MB, the kernel gives back at once; Python would take seconds.
    os._exit(0)
