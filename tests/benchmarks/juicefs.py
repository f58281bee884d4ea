"""JuiceFS over an S3 endpoint. It keeps models as blocks of its own, so they are copied into a volume first.

A volume's blocks are written as files of a directory and read as the objects of the bucket that this directory is, or
is uploaded to. Its metadata is in SQLite on this machine: a lookup costs JuiceFS no request, of which others make one.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.contenders import Contender, Mount, inherited, served
from tests.benchmarks.results import JUICEFS
from tests.services import S3Server, installed, run_tool

BUCKET = "juicefs"
COPY_S = 300


@dataclass(frozen=True, slots=True)
class Volume:
    """What is mounted: the metadata of a volume, and the directory of its objects in the bucket."""

    metadata: Path
    objects: Path


def volume(files: Path, store: Path, work: Path) -> Volume:
    """A volume of a directory with all its files, whose objects are in ``store/juicefs``. Raises ServiceError."""
    name, environment = files.name, inherited()
    metadata = work / f"juicefs-{name}.db"
    bucket = store / BUCKET
    bucket.mkdir(parents=True, exist_ok=True)
    formatting = ["format", f"sqlite3://{metadata}", name, "--storage=file", f"--bucket={bucket}/", "--trash-days=0"]
    run_tool([installed("juicefs"), *formatting], environment, COPY_S)
    copying = ["sync", f"{files}/", f"jfs://METADATA/{name}/"]
    run_tool([installed("juicefs"), *copying], environment | {"METADATA": f"sqlite3://{metadata}"}, COPY_S)
    return Volume(metadata, bucket / name)


def juicefs(of: Volume) -> Contender:
    """A volume, mounted with its own copy of the metadata."""

    @contextmanager
    def mount(directory: Path, server: S3Server) -> Iterator[Mount]:
        directory.mkdir(parents=True, exist_ok=True)
        for path in of.metadata.parent.glob(f"{of.metadata.name}*"):  # the database and what is not yet in it
            shutil.copy(path, directory)
        arguments = [
            *(installed("juicefs"), "mount", f"sqlite3://{directory / of.metadata.name}", str(directory / "models")),
            *("--read-only", "--no-bgjob", "--no-usage-report", "--no-syslog", "--backup-meta=0", "-o", "allow_other"),
            *("--storage=s3", f"--bucket={server.endpoint_url}/{BUCKET}", f"--cache-dir={directory / 'cache'}"),
            *("--attr-cache=60", "--entry-cache=60", "--dir-entry-cache=60", "--open-cache=60"),
            "--metrics=127.0.0.1:0",
        ]
        with served(JUICEFS, arguments, directory, server.environment()) as mounted:
            yield mounted

    return Contender(JUICEFS, mount)
