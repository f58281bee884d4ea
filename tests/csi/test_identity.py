"""Pods read with the role of their service account: two namespaces on moto's S3, whose roles differ.

The API server's tokens and the checks of STS are stand-ins (`tests.services.web_identity`); S3, its policies and the
credentials are moto's; driver and mount are real.
"""

import hashlib
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from mountctl.extras.csi import csi_pb2
from mountctl.extras.csi.csi_requests import NAMESPACE, SERVICE_ACCOUNT, TOKENS
from tests.csi.driver import Driver, needs_root, node, publication, refused, running, take_away, volumes
from tests.services.roles import Authorising, of_moto
from tests.services.web_identity import AUDIENCE, WebIdentities, start_sts
from tests.support.keepers import hanging, kill
from tests.support.mount_namespace import own_mounts
from tests.support.mounts import MountedStore, mounted, wait_until
from tests.support.users import STRANGER, as_user
from tests.support.versions import move, publish
from trimsfs.options.schema import default_user

pytestmark = needs_root

BUCKET = "clusters"
MINE, BOTH = os.urandom(3 << 20), os.urandom(1 << 20)
OBJECTS = {"released/for-a": MINE, "released/both": BOTH}
VERSIONS: dict[str, bytes] = {}
"""A model whose alias leads to its second version."""
ROLES = {"a": ["released/*"], "b": ["released/both", "versions/*"]}
OWNERS = {"a": ("team-a", "reader"), "b": ("team-b", "reader")}
TTL_S = 0.3


def put(key: str, content: bytes) -> str:
    """Write an object of the model with versions."""
    VERSIONS[f"versions/{key}"] = content
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


for version in ("v1", "v2"):
    publish(put, "model", version, {"params": version.encode()})
move(put, "model", "prod", "v2")
move(put, "model", "old", "v1")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A node's mount, which shows the same part of a bucket to each of two service accounts."""

    driver: Driver
    mount: MountedStore
    sts: WebIdentities
    tokens: Path
    log: list[str]

    def request(
        self, pod: str, namespace: str, path: str, *, token: str | None = None
    ) -> csi_pb2.NodePublishVolumeRequest:
        """What the kubelet asks for a pod of the service account ``reader``."""
        token = token or self.sts.token(namespace, "reader")
        tokens = json.dumps({AUDIENCE: {"token": token, "expirationTimestamp": "2030-01-01T00:00:00Z"}})
        attributes = {SERVICE_ACCOUNT: "reader", TOKENS: tokens, **({"path": path} if path else {})}
        return publication(self.driver.target(pod), f"csi-{pod}", attributes, namespace)

    def publish(self, pod: str, namespace: str, path: str, *, token: str | None = None) -> Path:
        request = self.request(pod, namespace, path, token=token)
        self.driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
        return self.driver.target(pod)


@pytest.fixture(scope="module")
def roles() -> Iterator[Authorising]:
    with of_moto(BUCKET, OBJECTS | VERSIONS, ROLES, {}) as found:
        yield found


@contextmanager
def cluster(directory: Path, roles: Authorising, extra: str = "", *, versions: bool = False) -> Iterator[Cluster]:
    """A node whose tenants' tables have these *extra* lines; with *versions*, of which b's second one is a's."""
    node(directory)
    tokens = directory / "run/tokens"
    tokens.parent.mkdir()
    config = directory / "config.toml"
    text = f"metadata_ttl = {TTL_S}\n"
    for path, owner in OWNERS.items():
        text += f'[[store]]\npath = "{path}"\nstore = "s3://{BUCKET}/released"\naddressing_style = "path"\n'
        text += f'[[tenants]]\npath = "{path}"\nrole_arn = "{roles.arn(path)}"\n'
        text += f'web_identity_token_file = "{tokens}/{"/".join(owner)}"\n{extra}\n'
    if versions:
        text += f'[[store]]\npath = "c"\nstore = "s3://{BUCKET}/versions"\naddressing_style = "path"\n'
        for path, role in (("c", "b"), ("c/model/v2", "a")):
            text += f'[[tenants]]\npath = "{path}"\nrole_arn = "{roles.arn(role)}"\n'
            text += f'web_identity_token_file = "{tokens}/{"/".join(OWNERS[role])}"\n'
    config.write_text(text)
    trust = {role: f"system:serviceaccount:{namespace}:{account}" for role, (namespace, account) in OWNERS.items()}
    with start_sts(roles.server, trust) as sts:
        environment = roles.server.environment() | {"AWS_ENDPOINT_URL_STS": sts.url}
        options = ("--cache-dir", directory / "cache", "--config", config)
        with mounted(None, directory / "mounts", *options, environment=environment) as mount:
            log: list[str] = []
            try:
                with running(directory, "--tokens-dir", tokens, log=log) as driver:
                    yield Cluster(driver, MountedStore(mount.path, directory / "cache"), sts, tokens, log)
            finally:
                take_away(directory / "pods")


@pytest.fixture(params=["", "share_cache = true"], ids=["apart", "shared"])
def shown(request: pytest.FixtureRequest, tmp_path: Path, roles: Authorising) -> Iterator[Cluster]:
    """With the caches apart, and with one cache for both."""
    with cluster(tmp_path, roles, request.param) as found:
        yield found


@pytest.fixture
def one(tmp_path: Path, roles: Authorising) -> Iterator[Cluster]:
    with cluster(tmp_path, roles) as found:
        yield found


def in_pod(volume: Path, program: str) -> str:
    """What a Python program prints in a mount namespace whose ``/mnt`` is a volume, as root, and in a PID namespace."""
    script = 'mount --bind "$0" /mnt && cd /mnt && exec "$1" -c "$2"'
    spaces = ("unshare", "--mount", "--propagation", "slave", "--pid", "--fork", "--mount-proc")
    command = [*spaces, *own_mounts(volume), "sh", "-ec", script, str(volume), sys.executable, program]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def refused_in(volume: Path, name: str) -> bool:
    """Whether a pod gets EACCES for a file of its volume by each way that there is."""
    ways = f"""
import os
def way(function, *arguments):
    try:
        return repr(function(*arguments))
    except OSError as error:
        return error.strerror
print(way(open, "{name}"))
print(way(open, ".trims/{name}/info"))
print(way(open, ".trims/{name}/tensors"))
for each in ("residency", "digest", "etag", "tensors", "generation"):
    print(way(os.getxattr, "{name}", "user.trims." + each))
"""
    return set(in_pod(volume, ways).splitlines()) == {"Permission denied"}


def test_neither_of_two_namespaces_reads_the_other_s_models(shown: Cluster) -> None:
    mine, theirs = shown.publish("pod-a", "team-a", "a"), shown.publish("pod-b", "team-b", "b")
    assert refused_in(theirs, "for-a"), "by the store"
    assert (mine / "for-a").read_bytes() == MINE
    assert (mine / "both").read_bytes() == (theirs / "both").read_bytes() == BOTH
    assert refused_in(theirs, "for-a"), "by what is cached, its control files and attributes"
    kill(shown.mount)
    assert refused_in(theirs, "for-a"), "by the next server's cache"
    assert (mine / "for-a").read_bytes() == MINE
    about = in_pod(
        theirs, "import os\nfor way in os.walk('.'): print(way)\nprint(os.listdir('..'), os.listdir('/mnt'))"
    )
    assert "team-a" not in about
    for path in ("a", "a/for-a", "", "a/.trims"):
        with pytest.raises(grpc.RpcError):
            shown.publish("pod-b2", "team-b", path)
    assert {each.rpartition("/")[0] for each in shown.sts.accepted} == {"team-a/reader", "team-b/reader"}


def test_a_path_is_for_pods_of_its_service_account_only(one: Cluster) -> None:
    """The driver has no tenants file: without service accounts, any pod may have all."""
    one.publish("pod-a", "team-a", "a")
    for namespace, path in (("team-b", "a"), ("team-a", "b"), ("default", "a"), ("team-a", ""), ("default", "")):
        with refused(grpc.StatusCode.PERMISSION_DENIED, "is for pods of another service account"):
            one.publish("other", namespace, path)
    request = one.request("other", "team-a", "a")
    request.volume_context[SERVICE_ACCOUNT] = "default"
    with refused(grpc.StatusCode.PERMISSION_DENIED, "another service account"):
        one.driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    assert len(volumes(one.driver.pods)) == 1
    assert sorted(map(str, one.tokens.rglob("*"))) == [f"{one.tokens}/team-a", f"{one.tokens}/team-a/reader"]


def test_an_alias_gives_nobody_a_version_of_another_service_account(tmp_path: Path, roles: Authorising) -> None:
    """Who publishes moves aliases, and the operator says to whom a path belongs."""
    with cluster(tmp_path, roles, versions=True) as found:
        assert (found.publish("pod-b", "team-b", "c/model/old") / "params").read_bytes() == b"v1"
        for path in ("c/model/prod", "c/model/v2"):
            with refused(grpc.StatusCode.PERMISSION_DENIED, "path 'c/model/v2' of the mount is for pods of another"):
                found.publish("other", "team-b", path)
        assert len(volumes(found.driver.pods)) == 1


def test_a_pod_cannot_claim_another_service_account(one: Cluster) -> None:
    """As if the CSIDriver had no podInfoOnMount: the kubelet's token tells whose it is."""
    mine = one.sts.token("team-a", "reader")
    one.publish("pod-a", "team-a", "a", token=mine)
    with refused(grpc.StatusCode.PERMISSION_DENIED, "the token is not of service account"):
        one.publish("pod-b", "team-a", "a", token=one.sts.token("team-b", "reader"))
    assert (one.tokens / "team-a/reader").read_text() == mine
    for name, value, words in (
        (TOKENS, "", "has not the one token"),
        (TOKENS, "[1]", "has not the one token"),
        (TOKENS, '{"a": {"token": "x.y.z"}}', "has not the one token"),
        (TOKENS, json.dumps({each: {"token": mine} for each in "ab"}), "has not the one token"),
        (SERVICE_ACCOUNT, "../team-a/reader", "another service account"),
        (NAMESPACE, "..", "another service account"),
    ):
        request = one.request("pod-b", "team-a", "a")
        request.volume_context[name] = value
        with pytest.raises(grpc.RpcError, match=words):
            one.driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    request = one.request("pod-b", "team-a", "a")
    request.secrets[TOKENS] = request.volume_context[TOKENS]
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "is given twice"):
        one.driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    assert len(volumes(one.driver.pods)) == 1


def test_a_token_is_for_the_server_alone_and_appears_nowhere(one: Cluster, tmp_path: Path) -> None:
    token = one.sts.token("team-a", "reader")
    request = one.request("pod-a", "team-a", "a")
    request.secrets[TOKENS] = json.dumps({AUDIENCE: {"token": token}})  # serviceAccountTokenInSecrets
    del request.volume_context[TOKENS]
    one.driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    (one.driver.target("pod-a") / "for-a").read_bytes()
    file = one.tokens / "team-a/reader"
    user = default_user()
    server = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    assert as_user(server, file.read_text) == token
    assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (server, 0o400)
    for look in (file.read_text, lambda: os.listdir(one.tokens), lambda: os.listdir(file.parent)):
        with pytest.raises(AssertionError, match="PermissionError"):
            as_user(STRANGER, look)
    with pytest.raises(grpc.RpcError):
        one.publish("pod-b", "team-b", "a", token=token)
    with pytest.raises(grpc.RpcError):
        one.publish("pod-b", "team-a", "nothing", token=token)
    signature = token.rpartition(".")[2]
    told = [one.mount.log(), *one.log, json.dumps(one.mount.control()), (one.mount.path / ".trims/metrics").read_text()]
    assert any("pod-a" in each for each in told)
    assert not [each for each in told if signature in each]
    cached = subprocess.run(["grep", "-rlF", signature, one.mount.cache], capture_output=True, timeout=60, check=False)
    assert (cached.returncode, cached.stdout) == (1, b"")


def test_a_republish_renews_the_token_before_it_expires(one: Cluster) -> None:
    """As with requiresRepublish. The credentials end soon, so that each request to the store takes new ones."""
    one.sts.lifetime_s = 60
    lifetime_s = 8
    ends = time.monotonic() + lifetime_s
    first = one.sts.token("team-a", "reader", lifetime_s=lifetime_s)
    target = one.publish("pod-a", "team-a", "a", token=first)
    assert (target / "both").read_bytes() == BOTH
    second = one.sts.token("team-a", "reader")
    one.publish("pod-a", "team-a", "a", token=second)
    assert (one.tokens / "team-a/reader").read_text() == second
    time.sleep(max(0.0, ends - time.monotonic()) + 0.2)
    assert (target / "for-a").read_bytes() == MINE
    assert len(volumes(one.driver.pods)) == 1


def test_without_a_republish_the_right_ends_and_a_later_one_gives_it_back(one: Cluster) -> None:
    one.sts.lifetime_s = 60
    target = one.publish("pod-a", "team-a", "a", token=one.sts.token("team-a", "reader", lifetime_s=8))
    assert (target / "both").read_bytes() == BOTH

    def ended() -> bool:
        try:
            (target / "for-a").open("rb").close()
        except PermissionError:
            return True
        return False

    wait_until(ended, timeout_s=40)
    one.publish("pod-a", "team-a", "a")
    wait_until(lambda: not ended(), timeout_s=20)
    assert (target / "for-a").read_bytes() == MINE


def test_a_volume_gets_a_token_that_was_lost_and_a_newer_one_while_its_mount_hangs(one: Cluster) -> None:
    target = one.publish("pod-a", "team-a", "a")
    file = one.tokens / "team-a/reader"
    file.unlink()
    one.publish("pod-a", "team-a", "a")
    assert (target / "both").read_bytes() == BOTH
    with hanging(one.mount):
        renewed = one.sts.token("team-a", "reader")
        one.publish("pod-a", "team-a", "a", token=renewed)
        assert file.read_text() == renewed
        file.unlink()
        with refused(grpc.StatusCode.UNAVAILABLE, "does not answer"):
            one.publish("pod-a", "team-a", "a")
    assert len(volumes(one.driver.pods)) == 1


def test_a_request_without_a_token_says_what_to_set(one: Cluster) -> None:
    request = one.request("pod-a", "team-a", "a")
    del request.volume_context[TOKENS]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "set one audience in tokenRequests of the CSIDriver"):
        one.driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    assert volumes(one.driver.pods) == []
