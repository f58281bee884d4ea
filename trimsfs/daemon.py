"""What a keeper starts as ``python -m trimsfs.daemon``: a server. Keepers of other versions rely on this name."""

from trimsfs.server.daemon import main

if __name__ == "__main__":
    main()
