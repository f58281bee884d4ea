"""A fake Hugging Face hub, as no real one can be reached from where the tests run: its API, and a CDN at a second port.

It answers what trimsfs asks, as https://huggingface.co/docs/hub/api and huggingface_hub's own code describe the hub.
Repositories are in memory: each put or delete is a commit. Files of LFS_FROM bytes and more are in LFS: their bytes
come from the CDN, by signed addresses. Run it with two ports; it is told what to do below ``/fake/``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

Reply = tuple[int, bytes, dict[str, str]]
"""Status, body and headers."""
LFS_FROM = 1000
TOKEN = "hf_test"
PAGE = 1000
_API = re.compile(r"/api/(?P<kind>model|dataset)s(?:/(?P<name>[^/]+/[^/]+)(?:/(?P<call>[a-z-]+)(?:/(?P<rest>.*))?)?)?")
_RESOLVE = re.compile(r"(?:/(?P<kind>dataset)s)?/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """The refs, and the files of each commit: their contents, by path. ``access`` is "", "gated" or "private"."""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    times: dict[str, str] = field(default_factory=dict)
    access: str = ""

    def commit(self, files: dict[str, bytes]) -> str:
        listed = json.dumps(sorted((path, oid(content)) for path, content in files.items()))
        sha = hashlib.sha1(f"{self.refs.get('main')}{listed}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.times[sha] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.refs["main"] = sha
        return sha


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if len(content) >= LFS_FROM else git_oid(content)


def described(path: str, content: bytes) -> dict[str, object]:
    """A file as the API describes it."""
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if len(content) >= LFS_FROM:
        entry |= {"oid": "0" * 40, "lfs": {"oid": oid(content), "size": len(content), "pointerSize": 134}}
        entry |= {"xetHash": "0" * 64}
    return entry


class RefusedError(Exception):
    """An answer that is no success: its status, the hub's code for it, a message, and further headers."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class State:
    """What the hub has, and what it was asked."""

    def __init__(self, cdn_port: int) -> None:
        self.cdn_port = cdn_port
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.signature = 0
        """Addresses of the CDN with an older signature have expired."""
        self.throttled = 0
        self.whole = False
        """Whether the hub itself ignores ranges."""
        self.damaged = False
        """Whether the last byte of each body is another one."""
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """Both ports: the server's ``cdn`` tells which."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_arguments: object) -> None:
        """Requests are in `State.requests`."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names are http.server's

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        with self.server.state.lock:
            try:
                status, content, headers = self._handle(urlsplit(self.path).path, urlsplit(self.path).query, body)
            except RefusedError as refused:
                status, content = refused.status, json.dumps({"error": str(refused)}).encode()
                headers = {"X-Error-Message": str(refused), "X-Error-Code": refused.code} | refused.headers
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value.encode("ascii", "replace").decode())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self, path: str, query: str, body: bytes) -> Reply:
        state = self.server.state
        if path.startswith("/fake/"):
            return self._tell(unquote(path).removeprefix("/fake/"), body)
        state.requests.append(f"{'CDN' if self.server.cdn else self.command} {path} {self.headers.get('range', '')}")
        if self.server.cdn:
            return self._bytes(path, query)
        if state.throttled:
            state.throttled -= 1
            raise RefusedError(429, "", "You have been rate limited", {"Retry-After": "1"})
        if (found := _RESOLVE.fullmatch(path)) is not None:
            return self._resolve(found["kind"] or "model", found["name"], *map(unquote, found.group(3, 4)))
        if (found := _API.fullmatch(path)) is not None:
            return self._api(found, parse_qs(query), body)
        raise RefusedError(404, "", "Not found")

    # The API

    def _api(self, found: re.Match[str], query: dict[str, list[str]], body: bytes) -> Reply:
        state, kind = self.server.state, found["kind"]
        if found["name"] is None:
            owner = query["author"][0]
            names = sorted(name for other, name in state.repositories if other == kind and name.startswith(f"{owner}/"))
            return self._page([{"id": name} for name in names], query)
        repository = self._repository(kind, found["name"], content=found["call"] == "auth-check")
        rest = found["rest"] or ""
        if found["call"] == "auth-check":
            return self._json({})
        if found["call"] == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha} for ref, sha in repository.refs.items()
            ]
            return self._json({"branches": branches, "tags": [], "converts": []})
        revision, _, path = rest.partition("/")
        commit = self._commit(repository, unquote(revision))
        files = repository.commits[commit]
        if found["call"] == "revision":
            return self._json({"id": found["name"], "sha": commit, "lastModified": repository.times[commit]})
        if found["call"] == "paths-info":
            wanted = parse_qs(body.decode(), keep_blank_values=True)["paths"]
            return self._json([described(path, files[path]) for path in wanted if path in files])
        prefix = f"{unquote(path)}/" if path else ""
        entries: dict[str, dict[str, object]] = {}
        for name, content in files.items():
            if name.startswith(prefix):
                first, slash, _ = name[len(prefix) :].partition("/")
                directory = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
                entries[prefix + first] = directory if slash else described(name, content)
        if prefix and not entries:
            raise RefusedError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        return self._page([entries[name] for name in sorted(entries)], query)

    def _repository(self, kind: str, name: str, *, content: bool) -> Repository:
        """A repository. Who may not read the *content* of a gated one may list it."""
        repository = self.server.state.repositories.get((kind, name))
        given = self.headers.get("authorization")
        if given not in {None, f"Bearer {TOKEN}"}:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        if repository is None or (repository.access == "private" and given is None):
            raise RefusedError(401 if given is None else 404, "RepoNotFound", "Repository not found")
        if content and repository.access == "gated" and given is None:
            raise RefusedError(401, "GatedRepo", f"Access to model {name} is restricted. You must be authenticated")
        if content and repository.access == "gated, not granted":
            raise RefusedError(403, "GatedRepo", f"Access to model {name} is restricted and you are not in the list")
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.refs.get(revision) or (revision if revision in repository.commits else None)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _page(self, entries: list[dict[str, object]], query: dict[str, list[str]]) -> Reply:
        limit = min(int(query.get("limit", [PAGE])[0]), PAGE)
        cursor = base64.b64decode(query["cursor"][0], validate=True) if "cursor" in query else b'{"from": 0}'
        start = json.loads(cursor)["from"]
        page, headers = entries[start : start + limit], {}
        if start + limit < len(entries):
            # As of the hub itself: base64 of what it goes on from, whose last character is "=".
            following = base64.b64encode(json.dumps({"from": start + limit}).encode().ljust(16))
            asked = urlencode({"limit": limit, "cursor": following})
            url = f"http://{self.headers['host']}{urlsplit(self.path).path}?{asked}"
            headers = {"Link": f'<{url}>; rel="next"'}
        return self._json(page, headers)

    # Bytes

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> Reply:
        repository = self._repository(kind, name, content=True)
        commit = self._commit(repository, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(content) < LFS_FROM:
            return self._send(content, headers | {"ETag": f'"{oid(content)}"'})
        state = self.server.state
        state.objects[oid(content)] = content
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid(content)}"'}
        location = f"http://127.0.0.1:{state.cdn_port}/{oid(content)}?signature={state.signature}"
        return 302, b"", headers | {"Location": location}

    def _bytes(self, path: str, query: str) -> Reply:
        content = self.server.state.objects.get(path.removeprefix("/"))
        if self.headers.get("authorization") is not None:
            raise RefusedError(400, "", "the CDN must not see a token")
        if content is None or query != f"signature={self.server.state.signature}":
            raise RefusedError(403, "", "the address has expired")
        return self._send(content, {"ETag": '"the-cdn-has-its-own"'})

    def _send(self, content: bytes, headers: dict[str, str]) -> Reply:
        if self.server.state.damaged and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if asked is None or not content or (self.server.state.whole and not self.server.cdn):
            return 200, content, headers
        start, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if start > last:
            raise RefusedError(416, "", "Range not satisfiable")
        headers |= {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
        return 206, content[start : last + 1], headers

    # Replies

    def _json(self, value: object, headers: dict[str, str] | None = None) -> Reply:
        return 200, json.dumps(value).encode(), (headers or {}) | {"Content-Type": "application/json"}

    # What tests tell it

    def _tell(self, what: str, body: bytes) -> Reply:
        state = self.server.state
        verb, _, rest = what.partition("/")
        if verb in {"put", "delete", "new", "access", "drop"}:
            kind, owner, name, path = [*rest.split("/", 3), ""][:4]
            repository = state.repositories.setdefault((kind, f"{owner}/{name}"), Repository())
            head = repository.commits.get(repository.refs.get("main", ""), {})
            if verb == "put":
                repository.commit({**head, path: body})
            elif verb == "new":
                repository.commit({})
            elif verb == "access":
                repository.access = body.decode()
            elif verb == "drop":  # as a squash of the history does
                repository.commits = {sha: files for sha, files in repository.commits.items() if sha != path}
            else:
                repository.commit({other: content for other, content in head.items() if other != path})
            return self._json({"commit": repository.refs["main"]})
        if verb == "tag":
            kind, owner, name, ref = rest.split("/", 3)
            repository = state.repositories[kind, f"{owner}/{name}"]
            repository.refs[ref] = body.decode() or repository.refs["main"]
            return self._json({})
        if verb == "set":
            assert hasattr(state, rest), rest
            setattr(state, rest, json.loads(body))
            return self._json({})
        requests, state.requests = state.requests, []
        return self._json(requests)


class Server(ThreadingHTTPServer):
    """One of the two ports."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Let a client hang up; print anything else."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def __init__(self, port: int, state: State, *, cdn: bool) -> None:
        self.state, self.cdn = state, cdn
        super().__init__(("127.0.0.1", port), Handler)


def main() -> None:
    port, cdn_port = map(int, sys.argv[1:])
    state = State(cdn_port)
    threading.Thread(target=Server(cdn_port, state, cdn=True).serve_forever, daemon=True).start()
    Server(port, state, cdn=False).serve_forever()


if __name__ == "__main__":
    main()
