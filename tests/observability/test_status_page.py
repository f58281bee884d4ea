"""The status page in Debian's Chromium, of a real mount."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.exporters import Exporter, exporting
from tests.support.mounts import MountedStore, mounted, trimsfs
from trimsfs.extras.exporter import history

pytestmark = pytest.mark.slow

MIB = 1 << 20
HOSTILE = "<img src=x onerror=document.title='owned'>"
MODELS = {"llama-3-8b": 24, "resnet50": 9, "whisper-large": 12, "bert-base": 5, "qwen-0.5b": 7, HOSTILE: 1}
PATIENCE_MS = 8000
SIZES = {"desktop": "1280,680", "phone": "500,1500"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    """An exporter of two mounts, of which one has been in use for some time."""
    if shutil.which("chromium") is None:
        pytest.skip("needs Debian's package chromium")
    directory = tmp_path_factory.mktemp("page")
    for name, size in MODELS.items():
        (directory / "store" / name).mkdir(parents=True)
        (directory / "store" / name / "model.safetensors").write_bytes(os.urandom(size * MIB))
    (directory / "empty").mkdir()
    token = directory / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    with ExitStack() as stack:
        mount = stack.enter_context(mounted(directory / "store", directory / "one"))
        stack.enter_context(mounted(directory / "empty", directory / "two"))
        exporter = stack.enter_context(exporting(token))
        stop = threading.Event()
        programs = threading.Thread(target=_use, args=(mount, stop))
        programs.start()
        stack.callback(programs.join)
        stack.callback(stop.set)
        stop.wait(float(os.environ.get("STATUS_PAGE_S", 3 * history.INTERVAL_S)))
        yield exporter


def _use(mount: MountedStore, stop: threading.Event) -> None:
    """Load models, which are evicted at times."""
    names = [name for name in MODELS if name != HOSTILE]
    trimsfs("pin", "--best-effort", mount.path / names[1])
    (mount.path / HOSTILE / "model.safetensors").read_bytes()
    with (mount.path / names[0] / "model.safetensors").open("rb"):
        for turn in range(1 << 20):
            if stop.wait(1 + turn % 7):
                return
            for name in names[: 2 + turn % 4]:
                (mount.path / name / "model.safetensors").read_bytes()
            if turn % 3 == 0:
                trimsfs("evict", mount.path / names[2 + turn % 3])


def chromium(page: Exporter, *options: str, directory: Path) -> str:
    """Have Chromium show the page; what it prints. The token is a password in the address, which no user would do."""
    settings = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}/profile"]
    wait = f"--virtual-time-budget={PATIENCE_MS}"
    url = f"http://any:{page.token}@127.0.0.1:{page.port}/"
    command = ["chromium", *settings, wait, "--hide-scrollbars", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=directory)
    return done.stdout


def test_a_browser_shows_hostile_names_as_text(page: Exporter, tmp_path: Path) -> None:
    text = chromium(page, "--dump-dom", directory=tmp_path)

    assert "<title>trimsfs</title>" in text
    assert f"{HOSTILE.replace('<', '&lt;').replace('>', '&gt;')}" in text
    assert "<img" not in text
    assert re.search(r"\d+ mounts, (all|\d+ not) well", text)
    assert text.count("<svg") >= 10
    assert re.search(r"pytest|python", text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_where_it_is_shown(page: Exporter, size: str, scheme: str, tmp_path: Path) -> None:
    file = tmp_path / "page.png"
    dark = [f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"]
    chromium(page, f"--screenshot={file}", f"--window-size={SIZES[size]}", *dark, directory=tmp_path)

    assert file.stat().st_size > 20_000
    if (kept := os.environ.get("STATUS_PAGE_SCREENSHOTS")) is not None:
        shutil.copy(file, Path(kept) / f"{size}-{scheme}.png")
