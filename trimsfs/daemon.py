"""What a keeper starts as ``python -m trimsfs.daemon``: a server. Keepers of other versions rely on this name."""

import gc
import os

if __name__ == "__main__":
    gc.disable()  # all that a start brings stays: to look through it again and again is a fifth of the start's time
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # it would read the metadata of all that is installed

    from trimsfs.server.daemon import main

    main()
    # The kernel frees at once what this process knows, 900 MB of a million names; Python would take six seconds.
    os._exit(0)
