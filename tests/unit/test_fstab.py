"""Option lists of mount(8), as people write them and as libmount passes them on."""

from pathlib import Path

import click.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.cli import fstab
from trimsfs.cli.fstab import parse, split
from trimsfs.errors import ConfigurationError
from trimsfs.options import MountOptions


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("", []),
        (",", []),
        ("ro", ["ro"]),
        ("ro,,nofail,", ["ro", "nofail"]),
        (" ro , cache_size=10GiB ", ["ro", "cache_size=10GiB"]),
        ('store="a,b",ro', ["store=a,b", "ro"]),
        ('"store=a,b"', ["store=a,b"]),
        ('store=a"b,c"d', ["store=ab,cd"]),
        ('store="a b"', ["store=a b"]),
        ("store=s3://b/x=y", ["store=s3://b/x=y"]),
    ],
)
def test_commas_part_options_except_in_quotes(text: str, items: list[str]) -> None:
    assert list(split(text)) == items


@pytest.mark.parametrize("text", ['"', 'a="b', 'a="b,c", "'])
def test_a_quote_that_is_not_closed_is_told(text: str) -> None:
    with pytest.raises(ConfigurationError, match="double quote"):
        list(split(text))


plain = st.text(st.characters(codec="ascii", exclude_characters='",', exclude_categories=["Cc", "Zs"]), min_size=1)


@given(st.lists(st.tuples(plain, st.booleans()), max_size=6))
def test_what_is_joined_is_parted_again(items: list[tuple[str, bool]]) -> None:
    text = ",".join(f'"{item},{item}"' if quoted else item for item, quoted in items)
    assert list(split(text)) == [f"{item},{item}" if quoted else item for item, quoted in items]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.options.sources.DEFAULT_CONFIG", Path("/nonexistent"))


def parsed(text: str, source: str = "s3://models") -> MountOptions:
    options, foreground = parse(text, source)
    assert not foreground
    return options


def test_options_are_those_of_trimsfs_mount_in_either_spelling() -> None:
    options = parsed("cache_size=10GiB,metadata-ttl=5,anonymous,no_allow_other,share_chunks=false,mode=0440,uid=7")
    assert (options.store, options.cache_size, options.metadata_ttl, options.mode, options.uid) == (
        *("s3://models", 10 << 30, 5),
        *(0o440, 7),
    )
    assert (options.anonymous, options.allow_other, options.share_chunks) == (True, False, False)


def test_options_of_every_mount_are_for_others() -> None:
    others = "defaults,rw,nosuid,nodev,noexec,relatime,_netdev,nofail,noauto,user,x-systemd.automount,comment=a b,sync"
    assert parsed(others) == parsed("")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cachesize=1", "mount option cachesize=1: there is no such option"),
        ("cache_size", "needs a value"),
        ("cache_size=much", "is not a size such as 10GiB"),
        ("no_cache_size=1", "there is no such option"),
        ("tenants=x", "there is no such option"),
        ("config=/nonexistent/file", "No such file"),
        ("mode=999", "is not an octal number"),
        ("fence", 'option --fence: set "fence" in the configuration file (see docs/configuration.md)'),
        ("no-fence", 'option --no-fence: set "fence" in the configuration file (see docs/configuration.md)'),
        ("stale_for=5", 'option --stale-for: set "stale_for" in the configuration file (see docs/configuration.md)'),
        ("cache-policy=lcu", "option --cache-policy lcu: write --eviction disk=lcu"),
    ],
)
def test_what_cannot_be_meant_is_told(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parsed(text)
    assert message in str(caught.value)


def test_sloppy_mounts_take_what_they_know() -> None:
    assert parse("cachesize=1,metadata_ttl=3", "none", sloppy=True)[0].metadata_ttl == 3
    with pytest.raises(ConfigurationError, match='set "signatures" in the configuration file'):
        parse("signatures=require", "none", sloppy=True)  # no mount is less safe than it was


def test_a_source_may_be_left_to_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "models, all.toml"
    file.write_text('mountpoint = "/models"\nstore = "/srv/models"\nmetadata_ttl = 9')
    options = parsed(f'config="{file}",metadata_ttl=8', "none")
    assert (options.store, options.metadata_ttl) == ("/srv/models", 8)
    assert parsed(f'config="{file}"', "/other").store == "/other"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-f", "-o", "ro"], 0),
        (["-fnv", "-t", "trimsfs"], 0),
        (["-f", "-o", "bogus"], 2),
        (["-N", "/proc/1/ns/mnt"], 2),
    ],
)
def test_it_is_called_as_mount_calls_helpers(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = click.testing.CliRunner().invoke(fstab.main, ["/srv/models", str(tmp_path), *arguments])
    assert done.exit_code == code, done.output
