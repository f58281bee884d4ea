"""``mount.trimsfs``, the helper of ``mount -t trimsfs`` and ``/etc/fstab``.

Called as ``mount.trimsfs SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS]``, see mount(8). Options are the
flags of ``trimsfs mount``, with - or _. Options for mount itself and for systemd are ignored.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from trimsfs.cli.mount import mount_store
from trimsfs.cli.mount_options import is_flag
from trimsfs.cli.output import reported
from trimsfs.command_group import examples
from trimsfs.errors import ConfigurationError
from trimsfs.options import FORMER, SCALARS, MountOptions, load_options

_OTHERS = re.compile(
    r"""(?x)
    defaults | _netdev | nofail | r[ow] | (no)?(auto|exec|suid|dev|atime|diratime|iversion|mand|user|users|owner|group)
    | (rel|strict|lazy)atime | norelatime | nostrictatime | nolazyatime | a?sync | dirsync | silent | loud | remount
    | (x-|X-|comment=|user=|uhelper=|helper=).*
    """
)
"""Options for mount(8) itself, systemd or people. A trimsfs mount is always read-only, nosuid, nodev and noatime."""


@click.command("mount.trimsfs", epilog=examples("mount -t trimsfs s3://my-models /models -o cache_size=500GiB"))
@click.argument("source")
@click.argument("mountpoint", type=Path)
@click.option("-o", "texts", multiple=True, metavar="OPTIONS", help="Options, separated by commas.")
@click.option("-s", "sloppy", is_flag=True, help="Ignore unknown options.")
@click.option("-f", "fake", is_flag=True, help="Do everything except mount.")
@click.option("-n", is_flag=True, help="Do not write /etc/mtab: trimsfs never does.", expose_value=False)
@click.option("-v", is_flag=True, help="Verbose: has no effect.", expose_value=False)
@click.option("-N", "namespace", help="Not supported.")
@click.option("-t", "_kind", help="The type, trimsfs.")
@reported
def main(
    source: str, mountpoint: Path, texts: tuple[str, ...], sloppy: bool, fake: bool, namespace: str | None, _kind: str
) -> None:
    """Mount the store SOURCE at MOUNTPOINT: the helper of `mount -t trimsfs`."""
    if namespace is not None:
        raise ConfigurationError("option -N: not supported: run mount inside the namespace, with nsenter")
    options, foreground = parse(",".join(texts), source, sloppy=sloppy)
    if fake:
        options.resolved(mountpoint)
        return
    mount_store(mountpoint, options, foreground=foreground)


def parse(text: str, source: str, *, sloppy: bool = False) -> tuple[MountOptions, bool]:
    """Parse an option list of mount(8) into options, and whether the mount stays in the foreground.

    Quotes protect commas in a value: ``store="a,b"``. If the source is ``none`` or ``trimsfs``, the store is an option
    or the default one. Raises ConfigurationError.
    """
    given: dict[str, Any] = {} if source in {"none", "trimsfs"} else {"store": source.strip()}
    configs: list[Path] = []
    foreground = False
    for item in split(text):
        spelled, equals, value = item.partition("=")
        name = spelled.replace("-", "_")
        negated = name.removeprefix("no_")
        if name == "config" and equals:
            configs.append(Path(value))
        elif name == "foreground" and not equals:
            foreground = True
        elif name in (*SCALARS, *FORMER):
            if not equals and (name in FORMER or not is_flag(name)):
                raise ConfigurationError(f"mount option {item}: needs a value, {item}=VALUE")
            given[name] = value.strip() if equals else True
        elif negated in SCALARS and not equals:
            given[negated] = False
        elif not _OTHERS.fullmatch(item) and not sloppy:
            raise ConfigurationError(f"mount option {item}: there is no such option: see `trimsfs mount --help`")
    return load_options(given, configs=configs), foreground


def split(text: str) -> Iterator[str]:
    """Split an option list at commas outside double quotes, and remove the quotes. Raises ConfigurationError."""
    for match in re.finditer(r'((?:"[^"]*"|[^",])*)(,|$|")', text):
        item, end = match[1], match[2]
        if end == '"':
            raise ConfigurationError(f"mount options {text}: a double quote is not closed")
        item = item.replace('"', "").strip()
        if item:
            yield item


if __name__ == "__main__":
    sys.exit(main())
