"""``python -m trimsfs`` is ``trimsfs``."""

from trimsfs.cli.main import main

main(prog_name="trimsfs")
