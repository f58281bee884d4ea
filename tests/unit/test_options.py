import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from trimsfs.errors import ConfigurationError
from trimsfs.mountinfo import escape
from trimsfs.options import MountOptions, load_options, sources

GIB = 1 << 30


@pytest.fixture(autouse=True)
def default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the default configuration file would be; there is none."""
    path = tmp_path / "etc/config.toml"
    monkeypatch.setattr(sources, "DEFAULT_CONFIG", path)
    return path


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


def load(
    arguments: dict[str, Any] | None = None,
    *,
    config: Path | None = None,
    environment: dict[str, str] | None = None,
) -> MountOptions:
    return load_options(arguments or {}, configs=[config] if config else [], environment=environment or {})


def error_of(
    arguments: dict[str, Any] | None = None,
    *,
    config: Path | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(arguments, config=config, environment=environment)
    return str(caught.value)


# Precedence


def test_a_later_source_beats_an_earlier_one(toml: Path) -> None:
    toml.write_text("metadata_ttl = 1.5\nregion = 'eu-west-1'")
    environment = {"TRIMSFS_METADATA_TTL": "2.5", "TRIMSFS_PROFILE": "models"}
    assert load(config=toml).metadata_ttl == 1.5
    assert load(config=toml, environment=environment).metadata_ttl == 2.5
    options = load({"metadata_ttl": 3.5}, config=toml, environment=environment)
    assert (options.metadata_ttl, options.profile, options.region) == (3.5, "models", "eu-west-1")


def test_an_overridden_value_need_not_be_valid(toml: Path) -> None:
    toml.write_text("uid = -1")
    assert load({"uid": 5}, config=toml).uid == 5


def test_the_default_file_is_read_unless_another_is_given(default_config: Path, toml: Path) -> None:
    default_config.parent.mkdir()
    default_config.write_text("store = 's3://models'")
    toml.write_text("")
    assert load().store == "s3://models"
    assert load(config=toml).store is None


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMSFS_STORE", "s3://from-environment")
    assert load_options({}).store == "s3://from-environment"


OTHERS = (
    *("STORE", "TRIMSFS_CONFIG", "TRIMSFS_MOUNTS_DIR", "TRIMSFS_VERBOSE", "TRIMSFS_MODELS", "TRIMSFS_MODEL_BERT"),
    *("TRIMSFS_PORT", "TRIMSFS_SERVICE_HOST", "TRIMSFS_FLEET_SERVICE_PORT", "TRIMSFS_FLEET_SERVICE_PORT_CHUNKS"),
    *("TRIMSFS_FLEET_PORT", "TRIMSFS_FLEET_PORT_9419_TCP", "TRIMSFS_FLEET_PORT_9419_TCP_ADDR"),
)


def test_other_variables_are_left_alone() -> None:
    assert load(environment=dict.fromkeys(OTHERS, "x")) == MountOptions()


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("TRIMSFS_CACHESIZE", "there is no such option: did you mean TRIMSFS_CACHE_SIZE?"),
        ("TRIMSFS_cache_size", "there is no such option: did you mean TRIMSFS_CACHE_SIZE?"),
        ("TRIMSFS_NO_SUCH", "there is no such option: unset it"),
        ("TRIMSFS_TENANTS", "a table: write [[tenants]] in a file"),
        ("TRIMSFS_STORES", "a table: write [[store]] in a file"),
    ],
)
def test_a_misspelt_variable_is_refused(variable: str, remedy: str) -> None:
    assert error_of(environment={variable: "5GiB"}) == f"variable {variable}: {remedy}"


# Values


@pytest.mark.parametrize(
    ("name", "texts", "value"),
    [
        ("min_free", ["10GiB"], 10 * GIB),
        ("min_free", ["1.5 GiB"], 3 * GIB // 2),
        ("min_free", ["5GB"], 5 * 10**9),
        ("min_free", ["4194304"], 4 << 20),
        ("min_free", ["0"], 0),
        ("min_free", ["2tib", "2Ti"], 2048 * GIB),
        ("min_free", ["5Gi"], 5 * GIB),
        ("min_free", ["1024Ki"], 1 << 20),
        ("min_free", [" 0.5 Mi "], 1 << 19),
        ("min_free", ["1Pi"], 1 << 50),
        ("mode", ["0640", "640", "0o640"], 0o640),
        ("allow_other", ["true", "1", "yes"], True),
        ("allow_other", ["no", "0"], False),
    ],
)
def test_values_are_understood_as_people_write_them(name: str, texts: list[str], value: int) -> None:
    for text in texts:
        understood = getattr(load(environment={f"TRIMSFS_{name.upper()}": text}), name)
        assert (understood, isinstance(understood, bool)) == (value, isinstance(value, bool))


@pytest.mark.parametrize("name", ["cache_size", "host_size"])
def test_a_size_too_small_for_a_model_is_refused(name: str, toml: Path) -> None:
    assert error_of({name: "10"}).endswith(" 10: is 10 bytes, which hold no model: write a unit, as in 10GiB")
    cause = "is 512 bytes, too small to hold a model: write 1MB or more, as in 10GiB"
    assert error_of({name: "0.5KiB"}).endswith(f" 0.5KiB: {cause}")
    toml.write_text(f'[[tenants]]\npath = "a"\n{name} = "0.5Ki"\n')
    assert error_of(config=toml) == f"[[tenants]] a in {toml}: {name}: {cause}"


@pytest.mark.parametrize("text", ["1,5GiB", "5Xi", "5Gigi", "10GiB/s", "10 GiB of disk", "1_000"])
def test_a_size_is_read_to_its_end(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a size such as 10GiB"):
        load(environment={"TRIMSFS_MIN_FREE": text})


def test_numbers_in_the_file_may_be_written_as_toml_has_them(toml: Path) -> None:
    toml.write_text("cache_size = 1_000_000\nmin_free = '2MiB'\nmode = 0o440\ndir_mode = '0550'")
    options = load(config=toml)
    assert (options.cache_size, options.min_free) == (1_000_000, 2 << 20)
    assert (options.mode, options.dir_mode) == (0o440, 0o550)


# Errors


@pytest.mark.parametrize(
    ("arguments", "text", "environment", "error"),
    [
        ({}, "", {"TRIMSFS_METADATA_TTL": "soon"}, "variable TRIMSFS_METADATA_TTL=soon: is not a number"),
        (
            *({}, "log_level = 'loud'", {}),
            "option log_level = 'loud' in {toml}: must be 'debug', 'info', 'warning' or 'error'",
        ),
        ({"uid": -3}, "uid = 4", {"TRIMSFS_UID": "5"}, "option --uid -3: must be 0 or more"),
        ({"mode": "rw"}, "", {}, "option --mode rw: is not an octal number such as 0444"),
        (
            *({}, "cachesize = '10GiB'", {}),
            "option cachesize = '10GiB' in {toml}: there is no such option: did you mean cache_size?",
        ),
    ],
)
def test_an_error_names_the_option_its_value_the_source_that_won_and_the_cause(
    arguments: dict[str, Any], text: str, environment: dict[str, str], error: str, toml: Path
) -> None:
    toml.write_text(text)
    assert error_of(arguments, config=toml, environment=environment) == error.format(toml=toml)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_size", "10 bananas"),
        ("cache_size", "-1"),
        ("min_free", "-1"),
        ("metadata_ttl", "-1"),
        ("metadata_ttl", "nan"),
        ("metadata_ttl", "inf"),
        ("stall_timeout", "0"),
        ("stall_timeout", "inf"),
        ("uid", "-1"),
        ("gid", "root"),
        ("mode", "0999"),
        ("dir_mode", "rwx"),
        ("addressing_style", "dns"),
        ("anonymous", "perhaps"),
    ],
)
def test_unusable_values_are_refused_in_one_line(name: str, value: str) -> None:
    text = error_of(environment={f"TRIMSFS_{name.upper()}": value})
    assert text.startswith(f"variable TRIMSFS_{name.upper()}={value}: ")
    assert "nput" not in text
    assert "\n" not in text


@pytest.mark.parametrize("store", ["s3://KEY:hidden@bucket/prefix", "ftp://user:hidden@host", "x+y://:hidden@h/"])
def test_a_password_in_a_store_is_refused_and_not_repeated(store: str, toml: Path) -> None:
    toml.write_text(f'store = "{store}"')
    for text in (error_of(config=toml), error_of(environment={"TRIMSFS_STORE": store})):
        assert "credentials do not belong there" in text
        assert "hidden" not in text


@pytest.mark.parametrize("store", ["sftp://user@host/x", "s3://bucket/a:b@c", "/a:b@c", "http://host:80/x"])
def test_what_only_looks_like_a_password_is_none(store: str) -> None:
    assert load_options({"store": store}, environment={}).store == store


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("memory_limit", "16MiB", "must be 32MiB or more"),
        ("mode", "01777", "must be 777 or less"),
        ("retry_deadline", "0", "must be more than 0"),
        ("uid", str(1 << 32), "must be 4294967294 or less"),
        ("gpu_memory", "80%", "is not a share such as 0.8"),
        ("gpu_memory", "80", "must be 1 or less"),
    ],
)
def test_a_bound_is_told_in_the_unit_of_the_option(name: str, value: str, cause: str) -> None:
    assert error_of(environment={f"TRIMSFS_{name.upper()}": value}).endswith(f": {cause}")


@pytest.mark.parametrize("content", [b"store = ", b"store = '\xff\xfe'"])
def test_what_is_no_toml_is_reported_with_the_file(toml: Path, content: bytes) -> None:
    toml.write_bytes(content)
    assert error_of(config=toml).startswith(f"configuration file {toml}: not valid TOML: ")


def test_a_file_that_cannot_be_read_is_reported(toml: Path) -> None:
    assert error_of(config=toml) == f"configuration file {toml}: No such file or directory"
    assert error_of(config=toml.parent) == f"configuration file {toml.parent}: Is a directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_default_file_in_a_directory_that_may_not_be_searched_is_reported(default_config: Path) -> None:
    default_config.parent.mkdir(mode=0o700)
    default_config.write_text("")
    os.seteuid(65534)
    try:
        text = error_of()
    finally:
        os.seteuid(0)
    assert text == f"configuration file {default_config}: Permission denied: run it as root, or let others read it"


# Defaults that depend on the user and the mount point


def as_user(monkeypatch: pytest.MonkeyPatch, uid: int, home: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(os, "getegid", lambda: uid)
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))


def test_defaults_of_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    as_user(monkeypatch, 0, tmp_path)
    options = MountOptions().resolved(Path("/mnt/models"))
    assert options.store == "/var/lib/trimsfs/models"
    assert options.cache_dir == Path("/var/cache/trimsfs/mnt-models")
    assert options.log_file == Path("/var/log/trimsfs/mnt-models.log")
    assert options.allow_other is True
    assert (options.uid, options.gid) == (0, 0)
    assert (options.mode, options.dir_mode) == (0o444, 0o555)
    options = MountOptions(mode=0o640).resolved(Path("/mnt"))  # w is dropped; who reads may search
    assert (options.mode, options.dir_mode) == (0o440, 0o550)


def test_defaults_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    as_user(monkeypatch, 1234, tmp_path)
    options = MountOptions().resolved(Path("/mnt/models"))
    assert options.store == str(tmp_path / ".local/share/trimsfs/models")
    assert options.cache_dir == tmp_path / ".cache/trimsfs/mnt-models"
    assert options.allow_other is False
    assert (options.uid, options.gid) == (1234, 1234)


def test_what_is_given_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    as_user(monkeypatch, 0, tmp_path)
    given_options = MountOptions(
        store="s3://models/prefix",
        cache_dir=tmp_path / "cache",
        log_file=tmp_path / "log",
        allow_other=False,
        uid=7,
        gid=8,
        mode=0o440,
        dir_mode=0o510,
        fetch_processes=7,
        server_user="models",
    )
    assert given_options.resolved(Path("/mnt")) == given_options


def test_relative_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options = MountOptions(store="models", cache_dir=Path("cache"), log_file=Path("log")).resolved(Path("/mnt"))
    assert options.store == str(tmp_path / "models")
    assert options.cache_dir == tmp_path / "cache"
    assert options.log_file == tmp_path / "log"


def test_resolved_options_survive_the_way_to_the_server(tmp_path: Path) -> None:
    options = load({"cache_size": "1GiB", "mode": "0440", "eviction": "disk=lcu,gpu=never"}).resolved(tmp_path)
    assert MountOptions.model_validate(options.model_dump(mode="json")) == options


# Names of cache directories


@pytest.mark.parametrize(
    ("mountpoint", "name"),
    [("/mnt/models", "mnt-models"), ("/mnt/my-models", "mnt-my%2Dmodels"), ("/a%2D", "a%252D"), ("/m", "m")],
)
def test_a_mount_point_as_a_file_name(mountpoint: str, name: str) -> None:
    assert escape(Path(mountpoint)) == name


def test_different_mount_points_have_different_names() -> None:
    texts = ("/" + "".join(letters) for length in range(6) for letters in itertools.product("a-./", repeat=length))
    mountpoints = {Path(text) for text in [*texts, "/root"] if not text.startswith("//")}
    names = {escape(mountpoint) for mountpoint in mountpoints if not {".", ".."} & set(mountpoint.parts)}
    assert len(names) == len([path for path in mountpoints if not {".", ".."} & set(path.parts)])
    assert not any("/" in name or name in {"", ".", ".."} for name in names)


TABLES = """
endpoint_url = "http://127.0.0.1:9000"
[[store]]
path = "/llms/"
store = "s3://llms"
profile = "llms"
[[store]]
path = "hub/local"
store = "models"
retry_deadline = 3
"""


def test_several_stores_have_options_of_their_own(toml: Path) -> None:
    toml.write_text(TABLES)

    options = load(config=toml).resolved(Path("/models"))

    (llms, of_llms), (local, of_local) = options.each_store()
    assert (options.store, llms, local) == ("several stores", "llms/", "hub/local/")
    assert (of_llms.store, of_llms.profile, of_llms.retry_deadline) == ("s3://llms", "llms", 15)
    assert (of_local.store, of_local.profile, of_local.retry_deadline) == (str(Path("models").absolute()), None, 3)
    assert of_llms.endpoint_url == of_local.endpoint_url == "http://127.0.0.1:9000"
    again = MountOptions.model_validate(options.model_dump(mode="json", exclude_none=True))
    assert again.each_store() == options.each_store()


def test_a_later_source_replaces_the_stores(toml: Path, default_config: Path) -> None:
    toml.write_text(TABLES)
    single = toml.with_name("single.toml")
    single.write_text('store = "s3://one"')

    assert load({"store": "s3://one"}, config=toml).each_store()[0][1].store == "s3://one"
    assert load_options({}, configs=[single, toml], environment={}).store is None
    assert load_options({}, configs=[toml, single], environment={}).stores == ()


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b/c", "a/b"), ("a", "a-b", "a/b")])
def test_no_store_lies_at_or_below_another(paths: tuple[str, ...], toml: Path) -> None:
    toml.write_text("".join(f'[[store]]\npath = "{path}"\nstore = "s3://x"\n' for path in paths))

    assert "lies at or below that of another" in error_of(config=toml)


STORE = "[[store]]\n"
TENANT = '[[tenants]]\npath = "a"\n'


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (f'{STORE}store = "s3://x"', "[[store]] number 1 in {toml}: has no path: write path = TEXT"),
        (f'{STORE}path = "x"', "[[store]] x in {toml}: has no store: write store = TEXT"),
        (f'{STORE}path = ".."\nstore = "s3://x"', "[[store]] .. in {toml}: path: is not a path below the mount point"),
        (f'{STORE}path = 3\nstore = "s3://x"', "[[store]] number 1 in {toml}: path: must be text in quotes"),
        (f'{STORE}path = "x"\nstore = "s3://user:secret@x"', "credentials do not belong there"),
        (
            f'{STORE}path = "x"\nstore = "s3://x"\ncache_size = 5',
            "cache_size: is an option of the whole mount: write it above all",
        ),
        (
            f'{STORE}path = "x"\nstore = "s3://x"\nendpoint-url = "x"',
            "there is no such option: did you mean endpoint_url?",
        ),
        (f"{TENANT}cache_size = 10", "cache_size: is 10 bytes, which hold no model: write a unit"),
        (TENANT + TENANT, "tenants: a has two tables: leave out one"),
        ('tenants = ["a"]', "[[tenants]] number 1 in"),
        ('store = ["s3://a", "s3://b"]', "[[store]] number 1 in"),
        ('[store]\npath = "x"', "[store] in {toml}: is one of several tables: write [[store]]"),
        ('[tenants]\npath = "x"', "[tenants] in {toml}: is one of several tables: write [[tenants]]"),
        ('[[stores]]\npath = "x"', "[[stores]] in {toml}: there is no such table: write [[store]]"),
        ('[[tenant]]\npath = "x"', "there is no such option: did you mean tenants?"),
    ],
)
def test_a_table_tells_what_is_wrong(text: str, cause: str, toml: Path) -> None:
    toml.write_text(text)

    error = error_of(config=toml)
    assert cause.format(toml=toml) in error
    assert "secret" not in error


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("fleet_listen", "models.example", "is no address that other hosts reach: write ADDRESS:PORT, such as 0.0"),
        ("fleet_listen", "unix:/run/fleet.sock", "is no address that other hosts reach"),
        ("fleet_listen", "0.0.0.0:0", "is no address that other hosts reach"),
        ("fleet_members", "https://10.0.0.1:7443", "is no list of hosts: write HOST:PORT,HOST:PORT, the path of"),
        ("signing_key", "/key.pem", "signing_key: nothing is checked: set signatures"),
    ],
)
def test_what_cannot_be_meant_is_refused(option: str, value: str, told: str) -> None:
    assert told in error_of(environment={f"TRIMSFS_{option.upper()}": value})
