"""How mounts are named."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mountctl.commands.declared_mounts import declared_mounts, find_mount
from mountctl.commands.main import main
from trimsfs.mountinfo import canonical, named_mountpoint


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the declaration of a mount, beside its mount point ``models``, where the process is."""
    (tmp_path / "models").mkdir()
    (tmp_path / "mounts.d").mkdir()
    (tmp_path / "mounts.d/one.toml").write_text(f'mountpoint = "{tmp_path}/models"\n')
    line = f"40 21 0:51 / {tmp_path}/models ro - fuse.trimsfs s3://models ro\n"
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        return line.encode() if path == Path("/proc/self/mountinfo") else read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mounts.d"


@pytest.mark.parametrize(
    "name", ["one", "./models", "models/", "mounts.d/../models", "models/llama/params", "{}/models"]
)
def test_a_mount_is_known_by_its_name_and_by_every_path_on_it(name: str, declared: Path) -> None:
    name = name.format(declared.parent)
    assert find_mount(name, declared).name == "one"
    if "/" in name:
        assert named_mountpoint(Path(name)) == declared.parent / "models"


def test_what_is_about_a_mount_point_itself_takes_no_path_below_it(declared: Path) -> None:
    found = find_mount("models/llama", declared, exact=True)
    assert (found.file, found.mountpoint) == (None, declared.parent / "models/llama")


def test_a_path_on_a_mount_is_resolved_without_touching_it(declared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(path: Path) -> str:
        raise AssertionError(f"{path} is touched")

    monkeypatch.setattr("os.path.realpath", hang)
    assert canonical(Path("models/llama")) == declared.parent / "models/llama"


def test_a_declared_mount_goes_up_though_its_models_were_removed(declared: Path) -> None:
    (mount,), _ = declared_mounts(declared)
    assert "--allow-empty" in mount.command()


def test_a_probe_of_a_keeper_loads_no_options(tmp_path: Path) -> None:
    """It runs each minute: they take as long as all else."""
    script = (
        "import sys\nfrom mountctl.commands.main import main\n"
        "try: main(sys.argv[1:])\nfinally: print('pydantic' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "keeper", "--check", str(tmp_path), "--mounts-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (10, "False\n"), done.stderr


@pytest.mark.parametrize("directory", ["mounts.d", "missing"])
def test_up_says_so_if_nothing_is_declared(directory: str, tmp_path: Path) -> None:
    (tmp_path / "mounts.d").mkdir()
    (tmp_path / "mounts.d/models.conf").write_text('mountpoint = "/models"\n')  # the wrong ending
    done = CliRunner().invoke(main, ["up", "--mounts-dir", str(tmp_path / directory)])
    assert done.exit_code == 0
    assert done.output == f"no mount is declared: {tmp_path / directory} has no file NAME.toml\n"
