"""The publisher's commands, as a user types them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from botocore.exceptions import ClientError
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.contract.backends import new_bucket, use_only
from tests.services import S3Server
from tests.support.mounts import trimsfs as run_trimsfs
from tests.support.signing import new_key, pem
from tests.versions.safetensors_files import check_reference_rules, file_of
from trimsfs.cli.main import main
from trimsfs.errors import ConfigurationError, StoreUnavailableError, TransientStoreError
from trimsfs.extras.signatures.signed_manifest import load_key, read_manifest
from trimsfs.extras.versions.commands.store_options import SEEN
from trimsfs.extras.versions.location import parse
from trimsfs.stores import writer

PART = 5 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "llama"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "sub/tokenizer.json").write_text("[]")
    (directory / "model.safetensors").write_bytes(file_of({"bias": b"123456", "weight": os.urandom(8192)}))
    (directory / ".git").mkdir()
    (directory / ".git/HEAD").write_text("ref")
    (directory / ".gitattributes").write_text("")
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Path:
    directory = tmp_path / "models"
    directory.mkdir()
    return directory


def trimsfs(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_a_model_is_pushed_by_one_command(model: Path, store: Path) -> None:
    result = trimsfs("push", model, f"{store}/llama:v1")
    assert result.stdout == f"{store}/llama:v1: published, 3 files, 8.3 kB, of which 8.3 kB were uploaded now\n{SEEN}\n"
    assert result.stderr == "trimsfs: left out 2 hidden names: .git, .gitattributes\n"
    found = {str(file.relative_to(store / "llama/v1")) for file in (store / "llama/v1").rglob("*") if file.is_file()}
    assert found == {"config.json", "sub/tokenizer.json", "model.safetensors"}

    again = trimsfs("push", model, f"{store}/llama:v1").stdout
    assert again == f"{store}/llama:v1: already published, 3 files, 8.3 kB\n"
    told = json.loads(trimsfs("push", "--json", model, f"{store}/llama:v1").stdout)
    assert (told["version"], told["files"], told["sent_bytes"], told["hidden"]) == ("v1", 3, 0, 2)
    (model / "config.json").write_text("[]")
    refused = trimsfs("push", model, f"{store}/llama:v1", code=20)
    assert refused.stderr.count("\n") == 1
    assert "v1: it is published with other files: choose another version" in refused.stderr


def test_a_version_without_a_name_is_named_after_its_content(model: Path, store: Path) -> None:
    first = json.loads(trimsfs("push", "--json", model, store / "llama").stdout)
    again = json.loads(trimsfs("push", "--json", model, store / "llama").stdout)
    assert (first["version"], again["sent_bytes"]) == (again["version"], 0)
    (model / "config.json").write_text("[]")
    assert json.loads(trimsfs("push", "--json", model, store / "llama").stdout)["version"] != first["version"]


def test_versions_aliases_rollback_and_removal(model: Path, store: Path) -> None:
    name = f"{store}/llama"
    assert "no versions" in trimsfs("versions", name, code=13).stderr
    for version, told in (("v1", f"prod leads to v1\n{SEEN}\n"), ("v2", "prod leads to v2, before to v1\n")):
        (model / "config.json").write_text(version)
        trimsfs("push", "--quiet", model, f"{name}:{version}")
        assert trimsfs("alias", name, "prod", version).stdout == told
    lines = trimsfs("versions", name).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["VERSION", "v1", "v2"]
    assert lines[2].endswith("prod")
    told = json.loads(trimsfs("versions", "--json", name).stdout)
    assert told["aliases"]["prod"]["history"] == ["v1"]

    assert "alias prod leads to it" in trimsfs("rm", f"{name}:v2", code=12).stderr
    assert trimsfs("rollback", name, "prod").stdout == "prod leads to v1\n"
    assert "stay until" in trimsfs("rm", f"{name}:v2").stdout
    assert "(removed, kept until" in trimsfs("versions", name).stdout
    listed = json.loads(trimsfs("versions", "--json", name).stdout)["versions"]
    kept = {each["version"]: each["kept_until"] for each in listed}
    assert kept["v1"] is None
    assert f"kept until {kept['v2']})" in trimsfs("versions", name).stdout
    assert (store / "llama/v2").exists()
    assert "no removed version whose grace period is over" in trimsfs("rm", "--expired", name).stdout
    trimsfs("push", "--quiet", model, f"{name}:v3")
    assert trimsfs("rm", "--grace", "0", f"{name}:v3").stdout == f"{name}:v3: its files are deleted\n"
    assert not (store / "llama/v3").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["push", "{model}/missing", "{store}/m:v1"], 13),
        (["push", "{model}", "{store}/missing/m:v1"], 5),
        (["push", "{model}", "{store}/m:aliases"], 2),
        (["push", "{model}", "hf://org/m:v1"], 2),
        (["push", "--sign", "{model}/config.json", "{model}", "{store}/m:v1"], 2),
        (["alias", "{store}/m", "prod", "v1"], 13),
        (["alias", "{store}/m:v1", "prod", "v1"], 2),
        (["alias", "{store}/m", "../x", "v1"], 2),
        (["rollback", "{store}/m", "prod"], 13),
        (["versions", "--json", "{store}/nothing"], 13),
        (["rm", "{store}/m"], 2),
        (["rm", "{store}/m:v1"], 13),
        (["rm", "--unfinished", "{store}/m:v1"], 13),
        (["rm", "--unfinished", "--expired", "{store}/m"], 2),
        (["rm", "--grace", "soon", "{store}/m:v1"], 2),
        (["diff", "{store}/m:v1", "{store}/m:v2"], 13),
        (["diff", "{store}/m", "{store}/m:v2"], 2),
        (["import", "{store}/missing", "{store}/m:v1"], 5),
    ],
)
def test_a_command_that_cannot_succeed_says_why_in_one_line(
    model: Path, store: Path, arguments: list[str], code: int
) -> None:
    result = trimsfs(*(argument.format(model=model, store=store) for argument in arguments), code=code)
    if "--grace" not in arguments:
        assert result.stderr.startswith("trimsfs: ")
        assert result.stderr.count("\n") == 1


def test_a_pushed_model_can_be_aligned_and_signed(model: Path, store: Path, tmp_path: Path) -> None:
    key = new_key()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(pem(key))
    for version in ("v1", "v1"):  # a signature is the same each time, so that a push can be repeated
        trimsfs("push", "--align", "--sign", private, model, f"{store}/llama:{version}")

    published = store / "llama/v1"
    check_reference_rules((published / "model.safetensors").read_bytes())
    assert (published / "model.safetensors").read_bytes() != (model / "model.safetensors").read_bytes()
    signed = read_manifest((published / "model.sig").read_bytes(), load_key(public))
    manifest = json.loads((store / "llama/.trims-versions/v1.json").read_text())
    assert {name: digest.value.hex() for name, digest in signed.items()} == {
        name: file["sha256"] for name, file in manifest["files"].items() if name != "model.sig"
    }
    (model / "model.sig").write_text("old")
    assert "--align changes what it signs" in trimsfs("push", "--align", model, f"{store}/llama:v2", code=2).stderr


def test_keys_of_other_kinds_and_missing_ones_are_refused(model: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(pem(ec.generate_private_key(ec.SECP256K1())))
    for name, told in (("key.pem", "not a private key"), ("missing", "No such file")):
        assert told in trimsfs("push", "--sign", tmp_path / name, model, f"{store}/llama:v1", code=2).stderr


def test_a_package_that_is_missing_is_told_before_anything_is_uploaded(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "trimsfs.extras.signatures.signed_manifest")
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    told = trimsfs("push", "--sign", store / "missing.pem", model, f"{store}/llama:v1", code=2).stderr
    cause = "import of cryptography.exceptions halted; None in sys.modules"
    assert told == f"trimsfs: option --sign: {cause}: pip install 'trimsfs[signatures]'\n"
    assert os.listdir(store) == []


def test_versions_are_compared(model: Path, store: Path) -> None:
    trimsfs("push", "--quiet", model, f"{store}/llama:v1")
    (model / "model.safetensors").write_bytes(file_of({"bias": b"123456", "weight": b"w" * 8192, "new": b"1"}))
    trimsfs("push", "--quiet", model, f"{store}/llama:v2")
    lines = trimsfs("diff", f"{store}/llama:v1", f"{store}/llama:v2").stdout.splitlines()
    assert [line.split()[:2] for line in lines if line[0] in "~+-"] == [
        ["~", "model.safetensors"],
        ["+", "new"],
        ["~", "weight"],
    ]
    assert "files: 2 equal, 1 changed" in lines
    assert "tensors: 1 equal, 1 changed, 1 added" in lines

    (store / "llama/.trims-versions/fingerprints/v2.json").unlink()
    lines = trimsfs("diff", f"{store}/llama:v1", f"{store}/llama:v2").stdout.splitlines()
    assert "tensors: 1 added, 2 of equal shape, but not compared" in lines


def test_what_hosts_share_is_told_of_versions_of_one_model_only(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in ("llama:v1", "other:v1"):
        trimsfs("push", "--quiet", model, f"{store}/{target}")
    told = trimsfs("diff", f"{store}/llama:v1", f"{store}/other:v1").stdout
    assert "a host that has A fetches 8.3 kB for B, and stores as much: they are of two models\n" in told
    assert "share-chunks" not in told
    found = json.loads(trimsfs("diff", "--json", f"{store}/llama:v1", f"{store}/other:v1").stdout)
    assert (found["fetched_bytes"] > 8192, found["missing_bytes"], found["shared_bytes"]) == (True, None, None)

    monkeypatch.chdir(store)
    assert trimsfs("diff", f"{store}/llama:v1", "./llama:v1").stdout == "the same version\n"
    assert json.loads(trimsfs("diff", "--json", f"{store}/llama:v1", "./llama:v1").stdout)["fetched_bytes"] == 0


def test_an_alias_may_be_compared_and_is_resolved(model: Path, store: Path) -> None:
    for version in ("v1", "v2"):
        (model / "config.json").write_text(version)
        trimsfs("push", "--quiet", model, f"{store}/llama:{version}")
    trimsfs("alias", f"{store}/llama", "prod", "v1")
    told = trimsfs("diff", f"{store}/llama:prod", f"{store}/llama:v2").stdout
    assert told == "prod leads to v1\n" + trimsfs("diff", f"{store}/llama:v1", f"{store}/llama:v2").stdout
    found = json.loads(trimsfs("diff", "--json", f"{store}/llama:v2", f"{store}/llama:prod").stdout)
    assert (found["first"], found["second"]) == ("v2", "v1")


def test_rm_of_an_alias_tells_the_command_that_removes_it(model: Path, store: Path) -> None:
    trimsfs("push", "--quiet", model, f"{store}/llama:v1")
    trimsfs("alias", f"{store}/llama", "prod", "v1")
    told = trimsfs("rm", f"{store}/llama:prod", code=13).stderr
    command = f"rm {store}/llama/.trims-versions/aliases/prod.json"
    end = f"name a version; `{command}` removes the alias\n"
    assert told == f"trimsfs: {store}/llama:prod: is an alias of v1: {end}"

    subprocess.run(command.split(), check=True, stdin=subprocess.DEVNULL)
    assert "no such version" in trimsfs("rm", f"{store}/llama:prod", code=13).stderr
    assert "files stay until" in trimsfs("rm", f"{store}/llama:v1").stdout


def test_the_command_that_removes_an_alias_reaches_the_same_store(
    model: Path, moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_only(moto, monkeypatch)
    reach = ["--endpoint-url", moto.endpoint_url, "--addressing-style", "path"]
    with contextlib.closing(moto.client()) as client:
        name = f"s3://{new_bucket(client).bucket}/llama"
        trimsfs("push", model, f"{name}:v1", *reach)
        trimsfs("alias", name, "prod", "v1", *reach)
        told = trimsfs("rm", f"{name}:prod", *reach, code=13).stderr
    assert f"`aws --endpoint-url {moto.endpoint_url} s3 rm {name}/.trims-versions/aliases/prod.json`" in told


def test_a_model_is_imported_from_another_store(
    model: Path, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PART_SIZE", PART)
    use_only(moto, monkeypatch)
    large = os.urandom(2 * PART + 7)
    with contextlib.closing(moto.client()) as client:
        source, target = new_bucket(client), new_bucket(client)
        for file in (file for file in model.rglob("*") if file.is_file()):
            source.put(f"org/llama/{file.relative_to(model)}", file.read_bytes())
        source.put("org/llama/large.bin", large)
        into = [f"s3://{target.bucket}/llama:v1", "--endpoint-url", moto.endpoint_url, "--addressing-style", "path"]
        arguments = ["import", f"s3://{source.bucket}/org/llama", *into, "--source-endpoint-url", moto.endpoint_url]
        before = set(tmp_path.rglob("*"))
        told = json.loads(trimsfs(*arguments, "--json").stdout)
        assert (told["files"], told["hidden"], told["sent_files"]) == (4, 2, 4)
        assert set(tmp_path.rglob("*")) == before
        assert client.get_object(Bucket=target.bucket, Key="llama/v1/large.bin")["Body"].read() == large
        assert json.loads(trimsfs(*arguments, "--json").stdout)["sent_bytes"] == 0


def test_a_store_that_does_not_answer_is_told_in_one_line(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"  # nobody listens there
        environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "TRIMSFS_RETRY_DEADLINE": "0.5"}
        push = ("push", model, "s3://bucket/llama:v1", "--endpoint-url", address)
        done = run_trimsfs(*push, environment=environment)
    assert (done.returncode, done.stderr.count("\n")) == (7, 1), done.stderr
    assert "Could not connect" in done.stderr
    assert done.stderr.endswith(": check the network and the address\n")


def test_an_error_of_a_bucket_names_the_option_for_another_server(
    model: Path, moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_only(moto, monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.endpoint_url)
    told = trimsfs("push", model, "s3://none-of-this-name/llama", code=5).stderr
    assert told == (
        "trimsfs: bucket none-of-this-name does not exist: check the spelling; "
        "for a server of your own: `s3://none-of-this-name/llama --endpoint-url URL`\n"
    )


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        ("silence", "check the network; for a server of your own: `s3://bucket/llama --endpoint-url URL`"),
        ("answer", "the store answers with this error: try again, or see its log"),
    ],
)
def test_a_store_that_answers_with_an_error_is_no_matter_of_the_network(
    model: Path, monkeypatch: pytest.MonkeyPatch, cause: str, remedy: str
) -> None:
    transient = TransientStoreError("no route")
    answer = ClientError({"Error": {"Code": "InternalError"}}, "PutObject")
    transient.__cause__ = answer if cause == "answer" else OSError()

    async def fails(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreUnavailableError("llama: no answer") from transient

    monkeypatch.setattr("trimsfs.stores.s3.s3_writer.S3Writer.list", fails)
    monkeypatch.setattr("trimsfs.extras.versions.commands.push.expire", fails)
    told = trimsfs("push", model, "s3://bucket/llama", code=7).stderr
    assert told == f"trimsfs: llama: no answer: {remedy}\n"


@pytest.mark.parametrize("command", [["push", "{model}", "{name}:v1"], ["versions", "{name}"], ["rm", "{name}:v1"]])
def test_an_error_of_a_bucket_names_the_model_and_no_inner_key(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    arguments = [argument.format(model=model, name="s3://bucket/org/llama") for argument in command]
    told = trimsfs(*arguments, code=6).stderr
    assert told.startswith("trimsfs: llama: bucket bucket: Unable to locate credentials: set ")
    assert told.count("\n") == 1


def test_what_is_no_directory_of_a_model_is_told(model: Path, store: Path) -> None:
    (model.parent / "empty").mkdir()
    (model.parent / "empty/.trims-prefetch.json").write_text('{"prefetch": false}')
    assert "there are no files in it" in trimsfs("push", model.parent / "empty", f"{store}/m:v1", code=2).stderr
    assert "is a file: name the directory" in trimsfs("push", model / "config.json", f"{store}/m:v1", code=2).stderr
    (model / "dangling").symlink_to("nowhere")
    assert "dangling: a link that leads nowhere: remove it" in trimsfs("push", model, f"{store}/m:v1", code=2).stderr


def test_arguments_in_the_wrong_order_get_a_hint(model: Path, store: Path) -> None:
    for target in ("s3://my-models/llama:v1", f"{store}/llama:v1"):
        told = trimsfs("push", target, model, code=2).stderr
        assert told == f"trimsfs: {target}: no such directory: DIR comes first: `trimsfs push {model} {target}`\n"
    told = trimsfs("push", "s3://a/m", "s3://b/m:v1", code=2).stderr
    assert told == "trimsfs: s3://a/m is a store, not a directory: write `trimsfs import s3://a/m s3://b/m:v1`\n"


def test_safetensors_that_are_cut_short_are_refused(model: Path, store: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for arguments in ([], ["--align"]):
        told = trimsfs("push", *arguments, model, f"{store}/llama:v1", code=2).stderr
        assert told.startswith(f"trimsfs: {file}: not valid safetensors: tensor 'weight': its bytes [")
        assert told.endswith(f" exceed the file of {file.stat().st_size} bytes\n")
    file.write_bytes(b"")
    assert "not valid safetensors" in trimsfs("push", model, f"{store}/llama:v1", code=2).stderr
    assert os.listdir(store) == []


def test_an_interrupted_push_says_that_the_same_command_goes_on(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimsfs.extras.versions.commands.push.publish", interrupted)
    told = trimsfs("push", model, f"{store}/llama:v1", code=130).stderr
    assert told.endswith("trimsfs: interrupted: the same command uploads what is missing\n")


def test_locations() -> None:
    for text, store, name, version in [
        ("s3://bucket/llama", "s3://bucket", "llama", None),
        ("s3://bucket/org/llama:v1", "s3://bucket/org", "llama", "v1"),
        ("/srv/models/llama:v1", "/srv/models", "llama", "v1"),
        ("/llama", "/", "llama", None),
        ("llama:v1.2", ".", "llama", "v1.2"),
        ("models/llama/", "models", "llama", None),
        ("file:///srv/models/llama", "file:///srv/models", "llama", None),
    ]:
        location = parse(text)
        assert (location.store, location.name, location.version) == (store, name, version)
    for text in ("", "s3://bucket", "/", "m:", "m:.x", ".", "..", "a/..", "m:removed", "s3://bucket/.trims-versions"):
        with pytest.raises(ConfigurationError):
            parse(text)


@pytest.mark.parametrize("command", ["push", "import"])
def test_a_name_without_a_store_publishes_nothing_in_this_directory(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(store)
    told = trimsfs(command, model, "llama:v5", code=2).stderr
    assert told == (
        "trimsfs: llama:v5: no store: write s3://BUCKET/llama:v5 or DIRECTORY/llama:v5, "
        "or ./llama:v5 for this directory\n"
    )
    assert os.listdir(store) == []
    trimsfs(command, model, "./llama:v5")
    assert os.listdir(store) == ["llama"]


def test_nothing_is_pushed_into_itself(model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    for target in ("./llama:v1", "llama/sub/m:v1", f"file://{model}/m"):
        told = trimsfs("push", "./llama", target, code=2).stderr
        assert told == f"trimsfs: {target}: it would lie in what is pushed, llama: name a store outside of it\n"
    assert not (model / ".trims-versions").exists()
    trimsfs("push", "./llama", f"{store}/llama:v1")
    trimsfs("push", store / "llama/v1", f"{store}/llama:v2")  # what lies beside is fine


def test_a_version_to_import_that_is_written_with_a_colon_is_told_with_a_slash(model: Path, store: Path) -> None:
    trimsfs("push", model, f"{store}/llama:v1")
    told = trimsfs("import", f"{store}/llama:v1", f"{store}/other:v1", code=5).stderr
    directory = f"trimsfs: {store}/llama:v1: no such directory"
    assert told == f"{directory}: a version of another store is {store}/llama/v1\n"
    trimsfs("import", f"{store}/llama/v1", f"{store}/other:v1")


@pytest.mark.parametrize("command", ["push", "import"])
def test_the_publishers_prefetch_hint_is_part_of_a_version(model: Path, store: Path, command: str) -> None:
    hint = model / ".trims-prefetch.json"
    for wrong in ("{", '{"prefetch": "model.safetensors"}', '{"prefetch": false}' + " " * (1 << 16)):
        hint.write_text(wrong)
        told = trimsfs(command, model, f"{store}/llama:v1", code=2).stderr
        assert told.startswith("trimsfs: .trims-prefetch.json: not understood: write ")
        assert told.count("\n") == 1
    hint.write_text('{"prefetch": ["model.safetensors", "sub/other.bin"]}')
    told = trimsfs(command, model, f"{store}/llama:v1", code=2).stderr
    remedy = "name files of the model, or remove it"
    assert told == f"trimsfs: .trims-prefetch.json: names sub/other.bin, which is not there: {remedy}\n"
    assert os.listdir(store) == []

    hint.write_text('{"prefetch": ["model.safetensors"]}')
    (model / "sub/.trims-prefetch.json").write_text("{")
    result = trimsfs(command, model, f"{store}/llama:v1")
    assert "left out 3 hidden names: .git" in result.stderr
    assert (store / "llama/v1/.trims-prefetch.json").read_text() == hint.read_text()
    assert not (store / "llama/v1/sub/.trims-prefetch.json").exists()
    assert ".trims-prefetch.json" in json.loads((store / "llama/.trims-versions/v1.json").read_text())["files"]


def test_an_error_of_concurrent_tasks_is_told_alone(model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "a").write_bytes(b"1")
    (model / "b").write_bytes(b"2")

    async def fails(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise ConfigurationError("broken")

    monkeypatch.setattr("trimsfs.stores.directory_writer.DirectoryWriter.find", fails)
    monkeypatch.setattr("trimsfs.extras.versions.content.LocalFile.read", fails)
    assert trimsfs("push", model, f"{store}/llama:v1", code=2).stderr == "trimsfs: broken\n"
