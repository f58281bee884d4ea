"""The ``trimsfs`` program. What starts other programs begins without the imports of the rest, which take 50 ms."""

import sys

from trimsfs.plugins import load, plugins


def main() -> None:
    """Run what the command line says."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in (direct := {"run": "trimsfs.cli.direct_run:main"} | plugins("direct")):
        load(direct[verb])(sys.argv[2:])
    from trimsfs.cli.main import main as command_line  # noqa: PLC0415

    command_line(prog_name="trimsfs")


if __name__ == "__main__":
    main()
