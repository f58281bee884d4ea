"""What `trimsfs mount --help` shows, and how an option is refused that is no flag, or that has another name now."""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from trimsfs.cli.diagnosis.doctor import doctor
from trimsfs.cli.main import main
from trimsfs.cli.mount import mount
from trimsfs.cli.mount_options import is_flag
from trimsfs.cli.serve import serve
from trimsfs.errors import ConfigurationError
from trimsfs.eviction_policies import NAMES
from trimsfs.exit_codes import exit_code
from trimsfs.options import FLAGS, FORMER, SCALARS, flag, load_options
from trimsfs.options.declaration import HEADINGS

MOST_FLAGS = 35
REFUSED = exit_code(ConfigurationError.__name__)


@pytest.mark.parametrize("width", [110, 80])
@pytest.mark.parametrize("verb", ["mount", "serve", "doctor"])
def test_the_help_has_few_options_each_below_a_heading(verb: str, width: int) -> None:
    done = CliRunner().invoke(main, [verb, "--help"], terminal_width=width)
    text, listed, lists = done.output.partition("\nGeneral:\n")
    lines = (listed + lists.partition("  Examples:\n")[0]).splitlines()
    headings = [line.removesuffix(":") for line in lines if re.fullmatch(r"[A-Z][a-zA-Z ]+:", line)]
    options = [line for line in lines if line.startswith("  -")]

    assert done.exit_code == 0
    assert headings == ["General", *(heading for heading in HEADINGS if heading in headings)]
    assert {flag(name) for name in FLAGS} < {line.split()[0] for line in options}
    assert len(options) <= MOST_FLAGS
    assert max(map(len, [*text.splitlines(), *lines])) <= width


@pytest.mark.parametrize("command", [mount, serve, doctor], ids=["mount", "serve", "doctor"])
@pytest.mark.parametrize("name", [name for name in SCALARS if name not in FLAGS])
def test_what_is_no_flag_is_refused_with_the_place_to_set_it(command: click.Command, name: str, tmp_path: Path) -> None:
    mountpoint = [] if command is doctor else [str(tmp_path / "models")]
    spellings = [[flag(name)], [flag(f"no_{name}")]] if is_flag(name) else [[flag(name), "1"]]
    for spelled in spellings:
        done = CliRunner().invoke(command, [*spelled, *mountpoint])
        told = f'option {spelled[0]}: set "{name}" in the configuration file (see docs/configuration.md)'
        assert (done.exit_code, done.output) == (REFUSED, f"trimsfs: {told}\n")


def test_the_policy_of_a_tier_is_that_of_the_last_source_that_has_one(tmp_path: Path) -> None:
    common, declared = tmp_path / "config.toml", tmp_path / "models.toml"
    common.write_text('eviction = "fifo"')
    declared.write_text('eviction = { host = "never" }')
    environment = {"TRIMSFS_EVICTION": "disk=lcu"}
    eviction = load_options({"eviction": "gpu=never"}, configs=[common, declared], environment=environment).eviction
    assert (eviction.disk, eviction.host, eviction.gpu) == ("lcu", "never", "never")


@pytest.mark.parametrize(("name", "tier"), FORMER.items())
def test_a_former_option_is_refused_with_its_new_spelling(name: str, tier: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(mount, [flag(name), "lcu", str(tmp_path / "models")])
    message = f"trimsfs: option {flag(name)} lcu: write --eviction {tier}=lcu\n"
    assert (done.exit_code, done.output) == (REFUSED, message)

    file = tmp_path / "config.toml"
    file.write_text(f'{name} = "lcu"')
    variable = f"TRIMSFS_{name.upper()}"
    for configs, environment, expected in [
        ([], {variable: "lcu"}, f"variable {variable}=lcu: write TRIMSFS_EVICTION={tier}=lcu"),
        ([file], {}, f"option {name} = 'lcu' in {file}: write eviction = \"{tier}=lcu\""),
    ]:
        with pytest.raises(ConfigurationError) as refused:
            load_options({}, configs=configs, environment=environment)
        assert str(refused.value) == expected


def test_former_options_of_one_source_become_one() -> None:
    with pytest.raises(ConfigurationError, match=r"--cache-policy never: write --eviction disk=never,gpu=lcu$"):
        load_options({"cache_policy": "never", "gpu_policy": "lcu"}, environment={})


# The policies of tiers


@pytest.mark.parametrize("text", ['{ disk = "lcu", host = "never" }', '"disk=lcu, host=never"'])
def test_a_file_names_a_policy_for_each_tier(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"eviction = {text}")
    eviction = load_options({}, configs=[file], environment={}).eviction
    assert (eviction.disk, eviction.host, eviction.gpu) == ("lcu", "never", "lru")


REMEDY = f"write {', '.join(NAMES[:-1])} or {NAMES[-1]}"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("lcu,fifo", f"lcu,fifo is no eviction policy: {REMEDY}"),
        ("disk=lcu,ram=fifo", "ram is no tier: write POLICY, or TIER=POLICY of disk, host, gpu"),
        ("disk=lcu,gpu=slowest", f"slowest is no eviction policy: {REMEDY}"),
    ],
)
def test_an_eviction_that_cannot_be_meant_is_told(written: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_options({"eviction": written}, environment={})
    assert str(caught.value) == f"option --eviction {written}: {told}"


def test_an_eviction_of_another_type_is_told(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("eviction = 5")
    with pytest.raises(ConfigurationError, match=r'eviction = 5 in .*: must be a policy, such as "lru", or a table'):
        load_options({}, configs=[file], environment={})
