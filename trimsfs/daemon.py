"""The server's entry point, ``python -m trimsfs.daemon``. Keepers of other versions rely on this name."""

import gc
import os

if __name__ == "__main__":
    gc.disable()  # objects made at start stay: collections would take a fifth of the start's time
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # plugins would read the metadata of every installed package

    from trimsfs.server.startup import main

    main()
    # The kernel frees this process's memory at once. Python would take six seconds for the 900 MB of a million names.
    os._exit(0)
