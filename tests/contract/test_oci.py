"""What only a registry as a store has: layouts of artifacts, tar layers, tags and digests, tokens, redirects."""

import base64
import contextlib
import hashlib
import io
import json
import os
import ssl
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import jwt
import modelpack_client
import pytest
import trio

from tests.contract.backends import read
from tests.contract.raw_server import Answer, RawServer, drip, hang_up, raw, raw_server, respond, stall, then
from tests.services.registry import (
    FILEPATH,
    MODEL,
    MODELKIT,
    PASSWORD,
    TITLE,
    USER,
    Layer,
    Registry,
    log_in,
    packed,
    password_of,
    start_registry,
    titled,
)
from tests.support.certificates import Authority
from tests.support.http_server import Server
from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreStalledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.oci import reference, tar_layer
from trimsfs.extras.stores.oci.registry import Registry as RegistryClient
from trimsfs.options import MountOptions
from trimsfs.stores.base import Store
from trimsfs.stores.digests import Digest
from trimsfs.stores.open import open_store

MIB = 1 << 20
COMPRESSED = "is compressed .*kit pack --compression no"
IDENTITY_TOKEN = "identity+token=="
FILES = {"config.json": b'{"layers": 2}', "shards/1.safetensors": b"one" * 999, "shards/2.safetensors": b"two" * 1001}


def options(store: str, **more: Any) -> MountOptions:
    return MountOptions(store=store, stall_timeout=2, **more)


def opened(url: str, **more: Any) -> contextlib.aclosing[Any]:
    return contextlib.aclosing(open_store(options(url, **more), max_requests=16))


@contextlib.asynccontextmanager
async def pushed(registry: Registry, name: str, layers: Sequence[Layer], **more: Any) -> AsyncIterator[Any]:
    """The store of an artifact that is new in a registry."""
    registry.push(f"{name}:v1", layers, **more)
    async with opened(f"oci://{registry.address}/{name}:v1") as store:
        yield store


def counted(monkeypatch: pytest.MonkeyPatch, method: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a method of the registry's client from now on."""
    calls, original = list[tuple[Any, ...]](), getattr(RegistryClient, method)

    def call(self: RegistryClient, *arguments: Any) -> Any:
        calls.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(RegistryClient, method, call)
    return calls


async def content(store: Store) -> dict[str, bytes]:
    """All files of a store."""
    found, left = dict[str, bytes](), [""]
    while left:
        page = await store.list_page(left.pop())
        left += page.prefixes
        found |= {each.key: await read(store, each) if each.size else b"" for each in page.objects}
    return found


@pytest.fixture
def name() -> str:
    """A repository of the test's own."""
    return f"models/{uuid.uuid4().hex[:12]}"


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory for Docker's configuration, with none in it; and no proxies."""
    for variable in [variable for variable in os.environ if variable.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    directory = tmp_path / "docker"
    directory.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(directory))
    return directory


# Layouts


def model_pack(form: str) -> list[Layer]:
    metadata = {"org.cncf.model.file.metadata+json": json.dumps({"mtime": "2024-05-06T07:08:09.123456789Z"})}
    return [
        Layer(
            packed({path: data}) if form == "tar" else data,
            f"{MODEL}.{'weight.config' if path.endswith('json') else 'weight'}.v1.{form}",
            {FILEPATH: path, TITLE: path, **metadata},
        )
        for path, data in FILES.items()
    ]


LAYOUTS = {
    "ModelPack, raw": model_pack("raw"),
    "ModelPack, tar": model_pack("tar"),
    "KitOps": [
        Layer(packed({"./config.json": FILES["config.json"]}), f"{MODELKIT}.code.v1.tar"),
        Layer(
            packed({"shards": None, **{path: data for path, data in FILES.items() if "shards" in path}}),
            f"{MODELKIT}.model.v1.tar",
            {FILEPATH: "shards"},
        ),
    ],
    "oras": [titled(path, data) for path, data in FILES.items()],
    "an image": [
        Layer(packed({"config.json": b"overwritten"}), "application/vnd.oci.image.layer.v1.tar"),
        Layer(packed({f"/{path}": data for path, data in FILES.items()}), "application/vnd.oci.image.layer.v1.tar"),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_layouts_of_artifacts_give_their_files(registry: Registry, name: str, layout: str) -> None:
    async with pushed(registry, name, LAYOUTS[layout]) as store:
        assert await content(store) == FILES
    async with opened(f"oci://{registry.address}/{name}:v1/shards") as store:
        assert set(await content(store)) == {"1.safetensors", "2.safetensors"}


async def test_what_oras_itself_pushes_is_found(registry: Registry, name: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" * 100)
    target = f"{registry.address}/{name}"
    registry.client().push(target=target, files=[str(tmp_path / "model.gguf")], disable_path_validation=True)
    async with opened(f"oci://{target}") as store:
        assert await content(store) == {"model.gguf": b"GGUF" * 100}
        assert store.identity == f"oci://{target}:latest"


async def test_what_another_client_pushes_as_a_modelpack_is_found(
    registry: Registry, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files as raw layers, a directory as a tar layer, each with the metadata of ModelPack."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    push_by_modelpack_client(registry, f"{name}:v1", tmp_path)
    async with opened(f"oci://{registry.address}/{name}:v1") as store:
        assert await content(store) == FILES
        weights, config = await store.stat("shards/1.safetensors"), await store.stat("config.json")
        assert (await store.digest(config), await store.digest(weights)) == (
            Digest(algorithm="sha256", value=hashlib.sha256(FILES["config.json"]).digest()),
            None,
        )
        assert config.modified_ns == 1_700_000_000 * 10**9


def push_by_modelpack_client(registry: Registry, target: str, directory: Path) -> None:
    for path, data in FILES.items():
        (directory / path).parent.mkdir(exist_ok=True)
        (directory / path).write_bytes(data)
        os.utime(directory / path, (1_700_000_000, 1_700_000_000))
    client = modelpack_client.ModelPackClient(insecure=True)
    layers = [
        modelpack_client.ModelLayer(directory / "config.json", media_type=f"{MODEL}.weight.config.v1.raw"),
        modelpack_client.ModelLayer(directory / "shards", media_type=f"{MODEL}.weight.v1.tar"),
    ]
    client.push(f"{registry.address}/{target}", layers=layers, config=modelpack_client.ModelPackConfig())


async def test_a_layer_without_a_name_is_named_for_its_digest(registry: Registry, name: str) -> None:
    layer = Layer(b"GGUF", "application/vnd.docker.ai.gguf.v3")
    async with pushed(registry, name, [layer]) as store:
        assert await content(store) == {layer.digest.replace(":", "-"): b"GGUF"}


async def test_times_are_those_of_the_files_else_of_the_artifact(registry: Registry, name: str) -> None:
    created = {"org.opencontainers.image.created": "2023-01-01T00:00:00Z"}
    layers = [*model_pack("raw")[:1], titled("plain", b"x"), Layer(packed({"in-tar": b"x"}), f"{MODEL}.doc.v1.tar")]
    async with pushed(registry, name, layers, annotations=created) as store:
        times = {each.key: each.modified_ns // 10**9 for each in (await store.list_page("")).objects}
    assert times == {"config.json": 1714979289, "plain": 1672531200, "in-tar": 1700000000}


async def test_directory_that_oras_compresses_is_told_with_the_remedy(
    registry: Registry, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # oras leaves a directory there
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.bin").write_bytes(b"x")
    target = f"{registry.address}/{name}:oras"
    registry.client().push(target=target, files=[str(tmp_path / "weights")], disable_path_validation=True)
    async with opened(f"oci://{target}") as store:
        await store.probe()
        with pytest.raises(StoreUnavailableError, match=f"layer weights {COMPRESSED}"):
            await store.list_page("")


async def test_file_that_happens_to_be_compressed_is_a_file(registry: Registry, name: str) -> None:
    async with pushed(
        registry, name, [Layer(b"\x1f\x8b", "application/vnd.oci.image.layer.v1.tar+gzip", {TITLE: "a.tgz"})]
    ) as store:
        assert await content(store) == {"a.tgz": b"\x1f\x8b"}


async def test_index_of_one_manifest_is_followed_and_of_more_is_told(registry: Registry, name: str) -> None:
    digests = [registry.push(f"{name}:part{number}", [titled("model", b"%d" % number)]) for number in (1, 2)]
    for tag, named in (("one", digests[:1]), ("two", digests)):
        media_type = "application/vnd.oci.image.index.v1+json"
        manifest = "application/vnd.oci.image.manifest.v1+json"
        index = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "manifests": [{"mediaType": manifest, "digest": digest, "size": 1} for digest in named],
        }
        answer = registry.client().session.put(
            f"http://{registry.address}/v2/{name}/manifests/{tag}",
            data=json.dumps(index),
            headers={"Content-Type": media_type},
        )
        assert answer.status_code == 201, answer.text
    async with opened(f"oci://{registry.address}/{name}:one") as store:
        assert await content(store) == {"model": b"1"}
    async with opened(f"oci://{registry.address}/{name}:two") as store:
        with pytest.raises(StoreUnavailableError, match=f"an index of 2 manifests: name one by @DIGEST: {digests[0]}"):
            await store.list_page("")


# Tar layers


async def test_files_of_a_tar_layer_are_found_and_read_by_range(
    registry: Registry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many requests as files, at most, and no more bytes of the layer than a window for each."""
    files = {f"{number}.safetensors": os.urandom(2 * MIB + number) for number in range(5)}
    registry.push(f"{name}:v1", [Layer(packed(files), f"{MODEL}.weight.v1.tar")])
    asked = counted(monkeypatch, "blob")
    async with opened(f"oci://{registry.address}/{name}:v1") as store:
        generation = await store.stat("3.safetensors")
        assert len(asked) <= len(files) + 1
        assert max(length for _, _, length in asked) == tar_layer.WINDOW
        asked.clear()
        assert await read(store, generation, MIB, MIB + 5) == files["3.safetensors"][MIB : MIB + 5]
        assert [length for _, _, length in asked] == [5]
        assert (await content(store)) == files


async def test_headers_that_are_close_together_are_read_in_few_requests(
    registry: Registry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{'long-name-' * 15}{number}": b"%d" % number for number in range(3000)}
    archive = packed(files)
    registry.push(f"{name}:v1", [Layer(archive, f"{MODEL}.code.v1.tar")])
    requests = counted(monkeypatch, "read")
    async with opened(f"oci://{registry.address}/{name}:v1") as store:
        assert len((await store.list_page("", limit=5000)).objects) == 3000
    assert len(requests) < len(archive) / MIB + 10
    assert sum(length for _, _, length in requests) < 1.1 * len(archive)


async def test_links_in_a_tar_layer_are_the_files_that_they_lead_to(registry: Registry, name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, kind, target in (
            ("blobs/aa", tarfile.REGTYPE, ""),
            ("snapshots/r/model", tarfile.SYMTYPE, "../../blobs/aa"),
            ("hard", tarfile.LNKTYPE, "blobs/aa"),
            ("again", tarfile.SYMTYPE, "snapshots/r/model"),
            ("out", tarfile.SYMTYPE, "../../etc/passwd"),
            ("absolute", tarfile.SYMTYPE, "/etc/passwd"),
            ("round", tarfile.SYMTYPE, "round"),
            ("fifo", tarfile.FIFOTYPE, ""),
        ):
            member = tarfile.TarInfo(path)
            member.type, member.linkname = kind, target
            member.size = 7 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"weights"))
    async with pushed(registry, name, [Layer(buffer.getvalue(), f"{MODELKIT}.model.v1.tar")]) as store:
        assert await content(store) == dict.fromkeys(("blobs/aa", "snapshots/r/model", "hard", "again"), b"weights")


def header(
    name: str = "model", size: int = 0, kind: bytes = tarfile.REGTYPE, form: Any = tarfile.PAX_FORMAT, pax: Any = None
) -> bytes:
    """An archive of one header, without what it says that follows."""
    member = tarfile.TarInfo(name)
    member.type, member.size, member.pax_headers = kind, size, pax or {}
    return member.tobuf(format=form) + bytes(1024)


def weights(archive: bytes, *, path: str = "weights", media_type: str = f"{MODEL}.weight.v1.tar") -> Layer:
    """A layer that is an archive."""
    return Layer(archive, media_type, {FILEPATH: path} if path else {})


ZIPPED = packed(FILES, compress=True)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (weights(b"no tar at all" * 1000), "layer weights: not an uncompressed tar archive"),
        (weights(packed({"a": b"x"})[:1024] + b"garbage" * 200), "layer weights: no tar header at byte 1024"),
        (weights(ZIPPED), "layer weights: not an uncompressed tar archive"),
        (weights(packed({"model": bytes(5000)})[:2048]), "layer weights: model is longer than the layer"),
        (weights(header("sparse", 0, tarfile.GNUTYPE_SPARSE, tarfile.GNU_FORMAT)), "layer weights: sparse is sparse"),
        (weights(header(size=1 << 40)), "layer weights: model is longer than the layer"),
        (weights(header("././@LongLink", 1 << 33, tarfile.GNUTYPE_LONGNAME, tarfile.GNU_FORMAT)), "a header of 8589"),
        (weights(packed({"dir/.wh.model": b""})), "layer weights: .* deletes a file of another layer"),
        (weights(packed({"dir\nforged: line/.wh.x": b""}), path="a\nb"), "deletes a file of another layer"),
        (weights(header(pax={"size": "-1024"})), "layer weights: model has -1024 bytes"),
        (weights(header(pax={"mtime": "inf"})), "infinity"),
        (weights(ZIPPED, media_type=f"{MODELKIT}.model.v1.tar+gzip"), f"layer weights {COMPRESSED}"),
        (weights(ZIPPED, path="a\nb", media_type=f"{MODEL}.weight.v1.tar+gzip"), COMPRESSED),
        (
            weights(ZIPPED, path="", media_type="application/vnd.docker.image.rootfs.diff.tar.gzip"),
            f"layer sha256:[0-9a-f]+ {COMPRESSED}",
        ),
    ],
    ids=[
        *("text", "garbage", "gzip", "cut", "sparse", "long", "header", "whiteout", "hostile", "negative", "time"),
        *("kit", "hostile and compressed", "image"),
    ],
)
async def test_layer_that_cannot_be_shown_is_told_in_one_line(
    registry: Registry, name: str, layer: Layer, told: str
) -> None:
    async with pushed(registry, name, [layer]) as store:
        with pytest.raises(StoreUnavailableError, match=rf"\A[^\n]*{told}[^\n]*\Z"):
            await store.list_page("")


def long_name(number: int, form: Literal[1, 2] = 2) -> bytes:
    return tarfile.TarInfo(f"{number:03}{'x' * tar_layer.PATH_MAX}").tobuf(format=form)


def global_header(number: int) -> bytes:
    return tarfile.TarInfo.create_pax_global_header({f"k{number}": "v" * 4096}) + tarfile.TarInfo(f"{number}").tobuf()


@pytest.mark.parametrize("member", [long_name, global_header])
async def test_headers_of_any_length_take_bounded_memory(monkeypatch: pytest.MonkeyPatch, member: Any) -> None:
    """Also of paths that are too long to be shown, and of attributes that hold for all members."""
    monkeypatch.setattr(tar_layer, "MOST_TEXT", 40_000)
    archive = b"".join(member(number) for number in range(12)) + bytes(1024)
    asked: list[int] = []

    def fetch(offset: int, length: int) -> bytes:
        asked.append(offset)
        return archive[offset : offset + length]

    monkeypatch.setattr(tar_layer, "WINDOW", 512)
    monkeypatch.setattr(tar_layer, "LARGEST_WINDOW", 8192)
    with pytest.raises(StoreUnavailableError, match="its names take"):
        list(tar_layer.members(fetch, len(archive), "layer", tar_layer.Budget()))
    assert max(asked) < len(archive) - 8192, "all was read"


async def test_a_path_that_is_too_long_does_not_exist() -> None:
    archive = long_name(1) + long_name(2, 1) + tarfile.TarInfo("short").tobuf() + bytes(1024)
    found = tar_layer.members(lambda at, length: archive[at : at + length], len(archive), "layer", tar_layer.Budget())
    assert [member.path for member in found] == ["short"]


async def test_a_header_that_is_a_chain_without_an_end_is_refused() -> None:
    """As of an old sparse file, whose map goes on in further blocks."""
    first = tarfile.TarInfo("sparse")
    first.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(first.tobuf(format=tarfile.GNU_FORMAT))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    following = bytes(504) + b"\1" + bytes(7)

    def fetch(offset: int, length: int) -> bytes:
        return (bytes(block) + following * (length // 512 + 1))[:length] if offset == 0 else following * (length // 512)

    with pytest.raises(StoreUnavailableError, match="a header of"):
        list(tar_layer.members(fetch, 1 << 40, "layer", tar_layer.Budget()))


@pytest.mark.parametrize(
    ("limit", "value", "told"),
    [
        ("MOST_FILES", 5, "layer w: more than 5 files: "),
        ("MOST_TEXT", 50, "layer w: its names take "),
        ("TIMEOUT_S", -1, "headers not read "),
    ],
)
async def test_artifact_of_too_many_names_is_refused(
    registry: Registry, name: str, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, told: str
) -> None:
    """A registry cannot have the server run out of memory, whatever the layers."""
    archives = [packed({f"{layer}/{number:03}": b"" for number in range(3)}) for layer in range(3)]
    registry.push(f"{name}:v1", [Layer(each, f"{MODEL}.weight.v1.tar", {FILEPATH: "w"}) for each in archives])
    monkeypatch.setattr(tar_layer, limit, value)
    async with opened(f"oci://{registry.address}/{name}:v1") as store:
        with pytest.raises(StoreUnavailableError, match=f"{told}.*pack fewer"):
            await store.list_page("")


# Tags and digests


@pytest.mark.promise("digest", on="oci")
async def test_digest_is_that_of_the_manifest_for_whole_layers_only(registry: Registry, name: str) -> None:
    layer = titled("whole", b"weights")
    async with pushed(registry, name, [layer, Layer(packed({"in-tar": b"x"}), f"{MODEL}.weight.v1.tar")]) as store:
        whole, member = await store.stat("whole"), await store.stat("in-tar")
        expected = Digest(algorithm="sha256", value=hashlib.sha256(b"weights").digest())
        assert [await store.digest(whole, certain=True), await store.digest(whole)] == [expected, expected]
        assert await store.digest(member) is None
        assert whole.etag == layer.digest


async def test_tag_that_moves_is_followed_and_a_digest_stays(registry: Registry, name: str) -> None:
    digest = registry.push(f"{name}:prod", [titled("a", b"same"), titled("b", b"old")])
    url = f"oci://{registry.address}/{name}"
    async with opened(f"{url}:prod") as tagged, opened(f"{url}@{digest}") as pinned:
        assert await content(tagged) == await content(pinned) == {"a": b"same", "b": b"old"}
        before = await tagged.stat("a")
        created = {"org.opencontainers.image.created": "2024-01-01T00:00:00Z"}
        registry.push(f"{name}:prod", [titled("a", b"same"), titled("b", b"new")], annotations=created)
        assert await content(tagged) == {"a": b"same", "b": b"new"}
        assert await tagged.stat("a") == before, "an unchanged file is another generation"
        assert await content(pinned) == {"a": b"same", "b": b"old"}
        assert tagged.identity != pinned.identity


async def test_manifest_is_read_once_for_each_digest(
    registry: Registry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(f"{name}:v1", [titled(f"dir{number}/model", b"x") for number in range(20)])
    asked = counted(monkeypatch, "manifest")
    async with opened(f"oci://{registry.address}/{name}:v1") as store:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(store.list_page, f"dir{number}/")
        await content(store)
    assert len(asked) == 1


async def test_an_artifact_that_takes_long_to_read_is_there_for_the_next_who_asks(
    registry: Registry, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks where an older answer is at hand waits 1 to 10 s."""
    registry.push(f"{name}:v1", [Layer(packed({"model": b"x"}), f"{MODEL}.weight.v1.tar")])
    reading, go_on, reads = threading.Event(), threading.Event(), list[int]()
    read_range = RegistryClient.read

    def slow(self: RegistryClient, digest: str, offset: int, length: int) -> bytes:
        reads.append(offset)
        reading.set()
        assert go_on.wait(20)
        return read_range(self, digest, offset, length)

    monkeypatch.setattr(RegistryClient, "read", slow)
    async with opened(f"oci://{registry.address}/{name}:v1") as store:
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.list_page, "")
                assert await trio.to_thread.run_sync(reading.wait, 20)
                nursery.cancel_scope.cancel()
        go_on.set()
        assert set(await content(store)) == {"model"}
    assert len(reads) == 1


@pytest.mark.promise("conditional ranged read", on="oci")
async def test_layer_that_the_registry_has_lost_is_another_generation(registry: Registry, name: str) -> None:
    layer = titled("model", b"lost bytes")
    async with pushed(registry, name, [layer]) as store:
        generation = await store.stat("model")
        answer = registry.client().session.delete(f"http://{registry.address}/v2/{name}/blobs/{layer.digest}")
        assert answer.status_code == 202
        with pytest.raises(ObjectChangedError, match=rf"model: the registry no longer has its layer {layer.digest}"):
            await read(store, generation)
        with pytest.raises(ObjectNotFoundError):
            await read(store, replace(generation, etag='"of another store"'))


# Authorisation: the registry is real and checks tokens itself; the token service is the tests' own


class TokenService:
    """Signs tokens for who has the password."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self._identity = self.authority.identity("127.0.0.1")
        self.server = Server(self.answer)

    def answer(self, request: BaseHTTPRequestHandler) -> tuple[int, Mapping[str, str], bytes]:
        query = parse_qs(urlsplit(request.path).query)
        if request.command == "POST":
            query = parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())
            allowed = query["grant_type"] == ["refresh_token"] and query["refresh_token"] == [IDENTITY_TOKEN]
        else:
            basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            allowed = request.headers.get("Authorization") == f"Basic {basic}"
        if not allowed:
            return 401, {}, b""
        _, repository, actions = query["scope"][0].split(":")
        assert query["service"] == ["test"]
        name = "access_token" if request.command == "POST" else "token"
        return 200, {}, json.dumps({name: self.token(repository, actions)}).encode()

    def token(self, repository: str, actions: str) -> str:
        now = int(time.time())
        access = [{"type": "repository", "name": repository, "actions": actions.split(",")}]
        claims = {"iss": "tests", "aud": "test", "sub": USER, "nbf": now - 60, "iat": now, "exp": now + 60}
        der = ssl.PEM_cert_to_DER_cert(self._identity.certificate.read_text())
        signer = {"x5c": [base64.b64encode(der).decode()]}
        return jwt.encode({**claims, "access": access}, self._identity.key.read_bytes(), "ES256", signer)


@contextlib.contextmanager
def with_tokens(registry: Registry, directory: Path) -> Iterator[tuple[Registry, TokenService]]:
    """Another registry of the same artifacts, which asks for tokens, and their service."""
    service = TokenService(directory)
    with service.server.running():
        token = {
            "realm": f"{service.server.url}/token",
            "service": "test",
            "issuer": "tests",
            "rootcertbundle": str(service.authority.certificate),
        }
        with start_registry({"auth": {"token": token}}, data=registry.directory) as guarded:
            yield guarded, service


async def test_token_is_fetched_once_and_renewed_when_it_is_refused(
    registry: Registry, name: str, tmp_path: Path, no_configuration: Path
) -> None:
    registry.push(f"{name}:v1", [titled("model", b"weights")])
    with with_tokens(registry, tmp_path) as (guarded, service):
        log_in(no_configuration, guarded.address)
        async with opened(f"oci://{guarded.address}/{name}:v1") as store:
            generation = await store.stat("model")
            async with trio.open_nursery() as nursery:
                for _ in range(16):
                    nursery.start_soon(read, store, generation)
            assert len(service.server.requests) == 1
            store._registry._authorisation.header = "Bearer expired"
            async with trio.open_nursery() as nursery:
                for _ in range(16):
                    nursery.start_soon(read, store, generation)
            assert len(service.server.requests) == 2


@pytest.mark.parametrize("source", ["file", "helper"])
async def test_identity_token_is_exchanged_for_a_token(
    registry: Registry, name: str, tmp_path: Path, no_configuration: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """As Azure's registry has them."""
    registry.push(f"{name}:v1", [titled("model", b"weights")])
    with with_tokens(registry, tmp_path) as (guarded, _):
        config: dict[str, Any] = {"auths": {guarded.address: {"identitytoken": IDENTITY_TOKEN}}}
        if source == "helper":
            monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            put_helper(tmp_path, json.dumps({"Username": "<token>", "Secret": IDENTITY_TOKEN}))
            config = {"credsStore": "test", "auths": {guarded.address: {}}}
        (no_configuration / "config.json").write_text(json.dumps(config))
        async with opened(f"oci://{guarded.address}/{name}:v1") as store:
            assert await content(store) == {"model": b"weights"}


def put_helper(directory: Path, answer: str) -> None:
    """A credential helper that gives this answer."""
    helper = directory / "docker-credential-test"
    helper.write_text(f"#!{sys.executable}\nimport sys\nassert sys.stdin.read()\nprint({answer!r})\n")
    helper.chmod(0o755)


@pytest.mark.parametrize("password", [None, "wrong"])
async def test_registry_that_refuses_is_told_with_the_remedy(
    registry: Registry, name: str, tmp_path: Path, no_configuration: Path, password: str | None
) -> None:
    registry.push(f"{name}:v1", [titled("model", b"weights")])
    with with_tokens(registry, tmp_path) as (guarded, _):
        if password is not None:
            log_in(no_configuration, guarded.address, password=password)
        async with opened(f"oci://{guarded.address}/{name}:v1") as store:
            with pytest.raises(
                StoreAccessError, match=rf"run `docker login {guarded.address}` as who mounts"
            ) as caught:
                await store.probe()
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize("source", ["file", "helper", "anonymous", "broken helper", "no helper"])
@pytest.mark.promise("credentials", on="oci")
async def test_passwords_come_from_dockers_configuration_or_its_helpers(
    registry: Registry, name: str, tmp_path: Path, no_configuration: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    registry.push(f"{name}:v1", [titled("model", b"weights")])
    with start_registry(password_of(tmp_path), data=registry.directory) as guarded:
        log_in(no_configuration, f"https://{guarded.address}" if source == "file" else guarded.address)
        if "helper" in source:
            monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            secret = {"ServerURL": guarded.address, "Username": USER, "Secret": PASSWORD}
            put_helper(tmp_path, "boom" if source == "broken helper" else json.dumps(secret))
            named = {guarded.address: "missing" if source == "no helper" else "test"}
            (no_configuration / "config.json").write_text(json.dumps({"credHelpers": named}))
        async with opened(f"oci://{guarded.address}/{name}:v1", anonymous=source == "anonymous") as store:
            if source in {"file", "helper"}:
                assert await content(store) == {"model": b"weights"}
                return
            with pytest.raises(
                StoreAccessError, match=r"docker login|docker-credential-(test: its answer|missing: No)"
            ):
                await store.probe()


@pytest.mark.parametrize("text", ["{", '{"auths": {"%s": {"auth": "!!"}}}', "[]"])
def test_configuration_that_cannot_be_read_is_told(no_configuration: Path, text: str) -> None:
    (no_configuration / "config.json").write_text(text.replace("%s", "r.example"))
    with pytest.raises(ConfigurationError, match=rf"{no_configuration}/config.json: is not a configuration of Docker"):
        open_store(options("oci://r.example/model"), max_requests=1)


# Redirects: by the registry's own middleware, to a server of the tests' own of the registry's files


def ranges_of(directory: Path, refuse: list[int]) -> Server:
    """A server of files by range, which answers 403 as often as *refuse* says."""

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, Mapping[str, str], bytes]:
        if refuse:
            return refuse.pop(), {}, b"<Error/>"
        data = (directory / urlsplit(request.path).path.lstrip("/")).read_bytes()
        first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1]
        return 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, part

    return Server(answer)


async def test_redirected_reads_go_on_by_range_without_the_registrys_credentials(
    registry: Registry, name: str, tmp_path: Path, no_configuration: Path
) -> None:
    """Later reads of a layer go there at once, until that place refuses."""
    registry.push(f"{name}:v1", [titled("model", b"0123456789")])
    refuse: list[int] = []
    with ranges_of(registry.directory, refuse).running() as storage:
        settings = {
            **password_of(tmp_path),
            "middleware": {"storage": [{"name": "redirect", "options": {"baseurl": f"{storage.url}/"}}]},
        }
        with start_registry(settings, data=registry.directory) as guarded:
            log_in(no_configuration, guarded.address)
            async with opened(f"oci://{guarded.address}/{name}:v1") as store:
                generation = await store.stat("model")
                asked = count_requests(store)
                assert await read(store, generation, 2, 5) == b"234"
                first = len(asked)
                assert await read(store, generation, 5, 9) == b"5678"
                assert len(asked) == first + 1, "the registry was asked again"
                refuse.append(403)
                assert await read(store, generation, 0, 2) == b"01"
                locations = store._registry._client._places
                locations.update(dict.fromkeys(locations, "http://127.0.0.1:1/gone"))
                with pytest.raises(TransientStoreError):
                    await read(store, generation, 0, 2)
                assert await read(store, generation, 0, 2) == b"01"
    assert [headers["range"] for _, headers in storage.requests] == [
        *("bytes=2-4", "bytes=5-8", "bytes=0-1", "bytes=0-1", "bytes=0-1")
    ]
    assert not [headers for _, headers in storage.requests if "authorization" in headers]


async def test_storage_behind_a_redirect_cannot_ask_for_the_registrys_credentials(no_configuration: Path) -> None:
    def answer(_: BaseHTTPRequestHandler) -> tuple[int, Mapping[str, str], bytes]:
        return 401, {"WWW-Authenticate": f'Bearer realm="{storage.url}/token",service="test"'}, b'{"token": "x"}'

    storage = Server(answer)
    manifest = respond("200 OK", manifest_of(titled("model", b"weights")))
    with storage.running():
        redirect = respond("307 Temporary Redirect", headers={"Location": f"{storage.url}/blob"})
        async with raw_server(manifest, manifest, manifest, redirect) as server:
            log_in(no_configuration, urlsplit(server.endpoint_url).netloc)
            async with artifact_of(server) as store:
                generation = await store.stat("model")
                with pytest.raises(StoreAccessError, match="the registry's storage refuses"):
                    await read(store, generation)
    assert [(path, headers.get("authorization")) for path, headers in storage.requests] == [("/blob", None)]


async def test_token_service_of_another_host_may_lack_tls_with_the_option_only(
    no_configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = respond("401 Unauthorized", headers={"WWW-Authenticate": 'Bearer realm="http://other.example/token"'})
    for plain_http, count in ((None, 0), (True, 1)):
        async with raw_server(asked) as server, raw_server(respond("403 Forbidden")) as tokens:
            registry = urlsplit(server.endpoint_url).netloc
            log_in(no_configuration, registry)
            monkeypatch.setenv("HTTP_PROXY", tokens.endpoint_url)
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            async with opened(f"oci://{registry}/model:v1", plain_http=plain_http) as store:
                with pytest.raises(StoreAccessError, match=r"has no TLS|token service answered with status 403"):
                    await store.probe()
        assert len(tokens.requests) == count


def count_requests(store: Any) -> list[str]:
    """The URLs that a store asks from now on."""
    asked: list[str] = []
    exchange = store._registry._client.send

    def counted(method: str, url: str, *arguments: Any) -> Any:
        asked.append(url)
        return exchange(method, url, *arguments)

    store._registry._client.send = counted
    return asked


# Faults, from a server of the tests' own

MANIFEST = json.dumps({"schemaVersion": 2, "layers": []}).encode()


def manifest_of(*layers: Layer) -> bytes:
    described = [
        {
            "mediaType": each.media_type,
            "digest": each.digest,
            "size": len(each.content),
            "annotations": dict(each.annotations),
        }
        for each in layers
    ]
    return json.dumps({"schemaVersion": 2, "layers": described}).encode()


def artifact_of(server: RawServer) -> Any:
    """The store of an artifact of a server."""
    return opened(f"oci://{urlsplit(server.endpoint_url).netloc}/model:v1")


def told(status: str, code: str) -> Answer:
    return respond(status, json.dumps({"errors": [{"code": code, "message": "a\nmessage"}]}).encode())


@pytest.mark.parametrize(
    ("answer", "expected", "match"),
    [
        (told("403 Forbidden", "DENIED"), StoreAccessError, "docker login"),
        (respond("401 Unauthorized"), StoreAccessError, "unnamed kind of credentials"),
        (
            respond("401 Unauthorized", headers={"WWW-Authenticate": 'Bearer realm="file:///etc/passwd"'}),
            StoreAccessError,
            "no TLS",
        ),
        (
            respond("401 Unauthorized", headers={"WWW-Authenticate": 'Bearer realm="http://other.example/token"'}),
            StoreAccessError,
            "'http://other.example/token' has no TLS",
        ),
        (told("404 Not Found", "MANIFEST_UNKNOWN"), BucketNotFoundError, "artifact .* does not exist"),
        (hang_up, TransientStoreError, None),
        (raw(b"SSH-2.0-OpenSSH\r\n"), TransientStoreError, None),
        (stall, StoreStalledError, "timeout|no complete answer"),
        (respond("307 Temporary Redirect", headers={"Location": "/v2/"}), StoreUnavailableError, "redirects"),
        (respond("307 Temporary Redirect", headers={"Location": "ftp://x/?secret"}), StoreUnavailableError, "ftp://x,"),
        (respond("200 OK", b"<html>"), StoreUnavailableError, "not from a registry"),
        (respond("200 OK", b"[]"), StoreUnavailableError, "not from a registry"),
        (respond("200 OK", b"[" * 100_000), StoreUnavailableError, "not from a registry"),
        (
            respond("200 OK", b'{"layers": [{"mediaType": "x", "digest": "md5:1", "size": 1}]}'),
            StoreUnavailableError,
            None,
        ),
        (
            respond("200 OK", b'{"layers": [{"mediaType": "x", "digest": "", "size": Infinity}]}'),
            StoreUnavailableError,
            "not from a registry",
        ),
        (respond("200 OK", b" " * (5 * MIB)), TransientStoreError, "larger than 4 MiB"),
        (then(respond("200 OK", length=10**6), drip(b" ", times=10**6)), StoreStalledError, "no complete answer"),
    ],
)
async def test_answers_that_are_no_artifact_are_told_in_one_line(
    answer: Answer, expected: type[StoreError], match: str | None
) -> None:
    stall_s = 0.3 if expected is StoreStalledError else 10.0
    async with raw_server(answer) as server:
        store = open_store(
            MountOptions(store=f"oci://{urlsplit(server.endpoint_url).netloc}/model:v1", stall_timeout=stall_s),
            max_requests=1,
        )
        with trio.fail_after(20), pytest.raises(expected, match=match) as caught:
            await store.list_page("")
        await store.aclose()
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_manifest_with_other_bytes_than_its_digest_is_refused() -> None:
    async with raw_server(respond("200 OK", MANIFEST)) as server:
        address = urlsplit(server.endpoint_url).netloc
        async with opened(f"oci://{address}/model@sha256:{'0' * 64}") as store:
            with pytest.raises(TransientStoreError, match="has other bytes"):
                await store.list_page("")


WHOLE = respond("200 OK", b"0123456789")
"""A layer without a range, as which only the whole one may come."""


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (WHOLE, StoreUnavailableError),
        (respond("206 Partial Content", b"0123", headers={"Content-Range": "bytes 0-3/10"}), StoreUnavailableError),
        (
            respond("206 Partial Content", b"3", length=4, headers={"Content-Range": "bytes 3-6/10"}),
            TransientStoreError,
        ),
        (told("416 Range Not Satisfiable", "RANGE_INVALID"), StoreUnavailableError),
    ],
    ids=["no ranges", "another range", "cut", "refused"],
)
async def test_answer_that_is_not_the_range_is_refused(answer: Answer, expected: type[StoreError]) -> None:
    manifest = respond("200 OK", manifest_of(titled("model", b"0123456789")))
    async with raw_server(manifest, manifest, manifest, answer) as server, artifact_of(server) as store:
        generation = await store.stat("model")
        with pytest.raises(expected):
            await read(store, generation, 3, 7)
        if answer is WHOLE:
            assert await read(store, generation) == b"0123456789"


# URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("oci://ghcr.io/org/model", ("https://ghcr.io/v2/org/model", "latest", False, "")),
        ("oci://ghcr.io/org/model:v1.2", ("https://ghcr.io/v2/org/model", "v1.2", False, "")),
        ("oci://127.0.0.1:5000/model:v1", ("http://127.0.0.1:5000/v2/model", "v1", False, "")),
        ("oci://localhost:5000/a/b/c/", ("http://localhost:5000/v2/a/b/c", "latest", False, "")),
        ("oci://[::1]:5000/model", ("http://[::1]:5000/v2/model", "latest", False, "")),
        ("oci://r.example:5000/m:v1/a//b/", ("https://r.example:5000/v2/m", "v1", False, "a/b/")),
        (f"oci://r.example/m@sha256:{'a' * 64}", ("https://r.example/v2/m", f"sha256:{'a' * 64}", True, "")),
        (f"oci://r.example/m:v1@sha256:{'a' * 64}", ("https://r.example/v2/m", f"sha256:{'a' * 64}", True, "")),
        ("oci://docker.io/model", ("https://registry-1.docker.io/v2/library/model", "latest", False, "")),
        ("oci://docker.io/ai/model", ("https://registry-1.docker.io/v2/ai/model", "latest", False, "")),
    ],
)
def test_urls_name_an_artifact(url: str, expected: Sequence[object]) -> None:
    found = reference.parse(url)
    client = RegistryClient(found, options(url), connections=1)
    assert (client._base, found.reference, found.pinned, found.prefix) == expected
    assert reference.parse(str(found)) == found


@pytest.mark.parametrize(
    "url",
    [
        "oci://",
        "oci://model",
        "oci://host/Model",
        "oci://host/model:",
        "oci://host/m@md5:1",
        "oci://host/org/m@sha256:abc",
        "oci://host/org/Model:v1",
        "oci://user:pw@host/model",
    ],
)
def test_urls_that_name_no_artifact_are_refused(url: str) -> None:
    with pytest.raises((ConfigurationError, ValueError), match=r"write oci://REGISTRY|credentials do not belong there"):
        open_store(options(url), max_requests=1)


def test_tls_is_left_out_for_this_host_and_by_the_option() -> None:
    for url, plain, expected in (
        ("oci://127.0.0.1/m", None, "http://"),
        ("oci://127.0.0.1/m", False, "https://"),
        ("oci://r.example/m", None, "https://"),
        ("oci://r.example/m", True, "http://"),
    ):
        client = RegistryClient(reference.parse(url), options(url, plain_http=plain), connections=1)
        assert client._base.startswith(expected)


async def test_registry_without_tls_is_told_with_the_option(registry: Registry, name: str) -> None:
    async with opened(f"oci://{registry.address}/{name}:v1", plain_http=False) as store:
        with pytest.raises(TransientStoreError, match="set plain_http if the registry has no TLS"):
            await store.probe()


# Networks


async def test_proxies_of_the_environment_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_server(respond("200 OK", MANIFEST)) as server:
        proxy = urlsplit(server.endpoint_url).netloc
        monkeypatch.setenv("HTTP_PROXY", f"http://us%20er:secret@{proxy}")
        monkeypatch.setenv("NO_PROXY", "other.example")
        for host in ("r.example", "other.example"):
            async with opened(f"oci://{host}/model:v1", plain_http=True) as store:
                if host == "r.example":
                    await store.probe()
                else:
                    with pytest.raises(TransientStoreError):
                        await store.probe()
    assert {request.partition(b" HTTP")[0] for request in server.requests} == {
        b"HEAD http://r.example/v2/model/manifests/v1",
        b"GET http://r.example/v2/model/manifests/v1",
    }
    credentials = base64.b64encode(b"us er:secret")
    assert all(b"Basic " + credentials in request for request in server.requests)


def test_proxy_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="the proxy in HTTP_PROXY or HTTPS_PROXY is not http://HOST:PORT"):
        open_store(options("oci://r.example/model"), max_requests=1)


async def test_certificate_is_checked_by_the_systems_authorities_or_those_of_the_environment(
    registry: Registry, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(f"{name}:v1", [titled("model", b"weights")])
    authority = Authority(tmp_path)
    own = authority.identity("127.0.0.1")
    tls = {"certificate": str(own.certificate), "key": str(own.key)}
    with start_registry({"http": {"tls": tls}}, data=registry.directory) as guarded:
        url = f"oci://{guarded.address}/{name}:v1"
        async with opened(url, plain_http=False) as store:
            with pytest.raises(TransientStoreError, match=r"CERTIFICATE_VERIFY_FAILED.*: set SSL_CERT_FILE"):
                await store.probe()
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        async with opened(url, plain_http=False) as store:
            assert await content(store) == {"model": b"weights"}
