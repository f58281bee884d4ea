"""A cache of huggingface_hub's own making, downloaded from a fake hub: no real one can be reached from here."""

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.http_server import Server

REPOSITORY = "models--org--model"
_DOWNLOAD = "import sys, huggingface_hub as hub; print(hub.snapshot_download('org/model', cache_dir=sys.argv[1]))"


def commit_of(files: Mapping[str, bytes]) -> str:
    """The commit under which the fake hub has these files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def download(cache: Path, files: Mapping[str, bytes]) -> Path:
    """Have huggingface_hub download a repository into a cache; the snapshot's directory."""
    with _hub(files) as endpoint:
        return snapshot(cache, {"HF_ENDPOINT": endpoint})


def snapshot(cache: Path, environment: Mapping[str, str]) -> Path:
    """What `snapshot_download` says is the directory of the repository's files."""
    settings = {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "HOME": "/nonexistent", **environment}
    done = subprocess.run(
        [sys.executable, "-c", _DOWNLOAD, cache],
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@contextlib.contextmanager
def _hub(files: Mapping[str, bytes]) -> Iterator[str]:
    commit = commit_of(files)

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, Mapping[str, str], bytes]:
        path = urlsplit(request.path).path
        if not path.startswith("/api/"):
            body = files[path.partition(f"/resolve/{commit}/")[2]]
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, body
        about: object = {"id": "org/model", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        if "/tree/" in path:
            about = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()

    with Server(answer).running() as server:
        yield server.url
