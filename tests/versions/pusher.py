"""Runs `trimsfs` in processes that are forked from one that has loaded it, so that they start at once."""

import contextlib
import multiprocessing
import os
import resource
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import botocore.loaders  # noqa: F401 - what takes long to load is loaded before the fork

import trimsfs.extras.versions.commands.push
import trimsfs.stores.directory_writer
import trimsfs.stores.s3.s3_writer  # noqa: F401
from trimsfs.cli.main import main
from trimsfs.stores import writer

PART = 5 << 20
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


def _run(arguments: Sequence[str], environment: dict[str, str], log: Path, largest_file: int) -> None:
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    writer.PART_SIZE = PART
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(list(arguments))


@contextlib.contextmanager
def started(
    arguments: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    *,
    largest_file: int = resource.RLIM_INFINITY,
) -> Iterator[BaseProcess]:
    """A process that runs `trimsfs` with these arguments; its output is appended to *log*.

    It can write no file of more than *largest_file* bytes, in memory neither.
    """
    process = _CONTEXT.Process(target=_run, args=(list(arguments), environment or {}, log, largest_file), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(30)


def ran(
    arguments: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    *,
    largest_file: int = resource.RLIM_INFINITY,
) -> int:
    """The exit code of `trimsfs` with these arguments."""
    with started(arguments, log, environment, largest_file=largest_file) as process:
        process.join(120)
        assert process.exitcode is not None, log.read_text()
        return process.exitcode
