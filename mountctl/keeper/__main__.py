"""``python -m mountctl.keeper``: a keeper, with its order on standard input."""

from mountctl.keeper.keeper import main

main()
