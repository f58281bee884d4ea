"""``trimsfs image``: what a microVM needs to read models from the host's one copy."""

import json
import os
import tempfile
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from trimsfs.cli.cache_commands import pin_before
from trimsfs.cli.gpu import counted
from trimsfs.cli.output import reported, say
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import ConfigurationError
from trimsfs.extras.images import erofs, image_tree
from trimsfs.extras.images.virtual_machines import MOST_DEVICES, OPTIONS, mount_command

_RECORD = ".json"
"""After an image's name: the file that tells which files of the mount are its devices."""


@click.command(
    epilog=examples(
        "trimsfs image /models/llama -o llama.erofs",
        "trimsfs image /models/llama/prod -o llama.erofs --run qemu",
        "trimsfs image --check llama.erofs",
    )
)
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=Path, shell_complete=complete_mounted)
@click.option("-o", "--output", "image", type=Path, metavar="FILE", help="Where to write the image.")
@click.option("--run", "monitor", type=click.Choice(list(OPTIONS)), help="Print the options of this program.")
@click.option(
    "--devices",
    type=click.IntRange(0, MOST_DEVICES),
    default=32,
    show_default=True,
    help="At most so many files become devices, the largest first; the bytes of the others are in the image.",
)
@click.option(
    "--check", "checked", type=Path, metavar="FILE", help="Check that the mount still has the files of an image."
)
@reported
def image(paths: tuple[Path, ...], image: Path | None, monitor: str | None, devices: int, checked: Path | None) -> None:
    """Make an image of models for microVMs.

    A guest mounts it as EROFS, with the names of the mount, and reads the pages that programs of the host read: each
    large file of the mount is a device of its own, read-only. Small files, and the rest of large ones beyond a multiple
    of 2 MiB, are in the image.

    trimsfs pins the files on devices; `trimsfs unpin PATH` ends that. A new version needs a new image. A file that is
    replaced in the store under its name may not be given to a guest with an older image: start the virtual machine,
    then see that --check exits 0.
    """
    if checked is not None:
        if paths or image is not None:
            raise ConfigurationError("option --check: takes an image alone: leave out PATH and --output")
        _check(checked)
        return
    if not paths or image is None:
        raise ConfigurationError("an image needs what it has and where it is: trimsfs image PATH... --output FILE")
    found = image_tree.read(paths, most_devices=devices)
    pin_before([device.path for device in found.devices])
    image_tree.check(found.devices)
    written = _write(found, image.absolute())
    memories = [(image.absolute(), image.stat().st_size), *((device.path, device.size) for device in found.devices)]
    shared = sum(device.size for device in found.devices)
    say(
        f"{image}: {counted(found.files, 'file')}, {decimal(found.file_bytes)}: {decimal(shared)} on "
        f"{counted(len(found.devices), 'device')}, {decimal(written)} in the image",
        error=True,
    )
    if monitor is None:
        for path, size in memories:
            say(f"device: {path}, {size} bytes, read-only")
    else:
        click.echo(OPTIONS[monitor](memories))
    say(f"in the guest: {mount_command(len(found.devices))}", error=monitor is not None)


def _write(found: image_tree.Tree, image: Path) -> int:
    """Write an image and its record in place of earlier ones; bytes of the image."""
    identifier = uuid.uuid4()
    record = {
        "image": str(identifier),
        "devices": [asdict(device) | {"path": str(device.path)} for device in found.devices],
    }
    try:
        with tempfile.TemporaryDirectory(prefix=f".{image.name}.", dir=image.parent) as directory:
            new = Path(directory, image.name)
            with new.open("x+b") as file:
                sizes = [device.size for device in found.devices]
                written = erofs.write(found.root, sizes, file, identifier=identifier.bytes)
                os.fsync(file.fileno())
            new_record = Path(directory, image.name + _RECORD)
            new_record.write_text(json.dumps(record, indent=2) + "\n")
            new.replace(image)
            new_record.replace(image.with_name(image.name + _RECORD))
    except OSError as error:
        raise ConfigurationError(f"option --output {image}: cannot be written: {error.strerror}") from error
    return written


def _check(image: Path) -> None:
    """Raises ConfigurationError without an image of this command, ObjectChangedError if a file is another one now."""
    record_file = image.with_name(image.name + _RECORD)
    try:
        record: dict[str, Any] = json.loads(record_file.read_text())
        of_image = uuid.UUID(bytes=erofs.identifier_of(image))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{image}: no image with its record {record_file.name}: {error}") from error
    if str(of_image) != record["image"]:
        raise ConfigurationError(f"{image}: {record_file.name} is the record of another image: make the image again")
    image_tree.check([image_tree.Device(**device | {"path": Path(device["path"])}) for device in record["devices"]])
    say(f"{image}: {counted(len(record['devices']), 'file')} of the mount as the image has them")
