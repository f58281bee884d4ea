"""List the networks, or write one of them. Prints JSON, a line for each network."""

import argparse
import json
from pathlib import Path

from .models import MODELS
from .weights import parameter_bytes, write_model


def _list() -> None:
    for name, entry in MODELS.items():
        described = {"name": name, "bytes": parameter_bytes(entry), "paper_mb": entry.paper_mb}
        described |= {"input_shape": entry.input_shape, "classes": entry.classes, "large": entry.large}
        print(json.dumps({**described, "note": entry.note}))


def main() -> None:
    """List, or write the network named on the command line."""
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("--list", action="store_true", help="what there is, with sizes worked out; writes nothing")
    parser.add_argument("name", nargs="?", choices=MODELS, metavar="NAME")
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIRECTORY")
    options = parser.parse_args()
    if options.list:
        _list()
    elif options.directory is None:
        parser.error("say --list, or NAME and DIRECTORY")
    else:
        written = write_model(options.name, options.directory)
        print(json.dumps({"name": options.name, "bytes": written}))


if __name__ == "__main__":
    main()
