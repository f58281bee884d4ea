"""What the docs promise of a mount, on hosts with each kernel: right bytes for readers, reasons for administrators."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.machines.hosts import BY_PACKAGE, Host
from tests.machines.kernel_table import Feature
from tests.machines.machine import HOST
from tests.services.fast import start_fast

CHECK = "sha256sum --quiet -c /sums"
MAPPED = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
    print(hashlib.sha256(mapping).hexdigest())
"""
UPGRADE = {
    True: "dpkg --install /dist/trimsfs_*.deb",
    False: """
        /opt/trimsfs/bin/pip install -q --force-reinstall --no-deps --no-index --find-links /dist/wheelhouse trimsfs
        mountctl upgrade models
    """,
}
TENANTS = """
[[access]]
path = "other"
gid = 4242
mode = "0440"

[[tenants]]
path = "many"
cache_size = "1MiB"
"""
READER = """
[Unit]
RequiresMountsFor=/fstab
After=trimsfs@models.service trimsfs@away.service
[Service]
Type=oneshot
ExecStart=sh -euxc "sha256sum /models/model /fstab/model /away/model > /read"
[Install]
WantedBy=multi-user.target
"""
SERVER = "pgrep -f '^trimsfs server'"

pytestmark = [pytest.mark.slow, pytest.mark.machine, pytest.mark.alone, pytest.mark.timeout(2400)]

Cell = Callable[[str, object], None]


def test_kernel_is_told_of_once_and_in_words(host: Host) -> None:
    said = host.run("""
        trimsfs mount /store /models --log-file /log
        trimsfs status
        cat /log
        trimsfs umount /models
        trimsfs doctor --store /store || true
    """)
    lacking = {"passthrough": (6, 9), "takeover": (6, 9)}
    for feature, since in lacking.items():
        assert (f"no {feature}" in said or f"no FUSE {feature}" in said) == (host.linux < since), said
    assert "Traceback" not in said


@pytest.mark.feature(Feature.PASSTHROUGH)
def test_passthrough(host: Host, record_property: Cell) -> None:
    host.run(f"trimsfs mount /store /models; cd /models; {CHECK}; {CHECK}")
    lines = host.run("cat /models/.trims/metrics; cd /; trimsfs umount /models").splitlines()
    (passed,) = (float(line.split()[1]) for line in lines if line.startswith("trimsfs_files_passthrough_opens_total "))
    assert (passed > 0) == host.takes_over
    record_property("cell", "yes" if passed else "no: through the server")


@pytest.mark.feature(Feature.READS)
def test_reads(host: Host) -> None:
    said = host.run(f"""
        trimsfs mount /store /models
        cd /models && {CHECK} && {CHECK}
        python3 -c '{MAPPED}' model
        cd / && trimsfs umount /models
        sha256sum < /store/model
    """)
    mapped, stored = said.splitlines()[-2:]
    assert mapped == stored.split()[0]


@contextmanager
def s3_store(directory: Path) -> Iterator[tuple[str, str]]:
    """A store of this host with a model in s3://bucket: its address for machines, and variables with credentials."""
    (directory / "bucket").mkdir()
    (directory / "bucket/model").write_bytes(bytes(range(256)) * 50_000)
    with start_fast(directory) as server:
        credentials = f"AWS_ACCESS_KEY_ID={server.access_key} AWS_SECRET_ACCESS_KEY={server.secret_key}"
        yield server.endpoint_url.replace("127.0.0.1", HOST), f"{credentials} AWS_REGION={server.region}"


@pytest.mark.feature(Feature.S3)
def test_s3(host: Host, tmp_path: Path) -> None:
    with s3_store(tmp_path) as (endpoint, variables):
        said = host.run(f"""
            export {variables}
            trimsfs mount s3://bucket /models --endpoint-url {endpoint}
            python3 -c 'assert open("/models/model", "rb").read() == bytes(range(256)) * 50_000'
            trimsfs umount /models
            echo right
        """)
    assert said.endswith("right\n")


@pytest.mark.feature(Feature.EVICTION)
def test_eviction(host: Host) -> None:
    host.run(f"""
        trimsfs mount /store /models --cache-size 24MiB --cache-dir /var/cache/trimsfs/small
        cd /models
        for turn in 1 2; do {CHECK}; done
        test "$(du -sm --exclude index.sqlite* /var/cache/trimsfs/small | cut -f 1)" -le 26
        trimsfs evict other
        {CHECK}
        cd / && trimsfs umount /models
    """)


@pytest.fixture
def declared(host: Host) -> None:
    """The mount that systemd serves at /models."""
    host.run("cp /models.toml /etc/trimsfs/mounts.d; systemctl start trimsfs@models; cmp /store/model /models/model")


@pytest.mark.usefixtures("declared")
@pytest.mark.feature(Feature.RESTART)
def test_restart(host: Host, record_property: Cell) -> None:
    try:
        said = host.run(f"""
            exec 3< /models/model
            before=$({SERVER})
            mountctl restart /models 2>&1 || echo "exit $?"
            cmp /store/model - <&3
            exec 3<&-
            if test "$before" = "$({SERVER})"; then echo same; fi
        """)
    finally:
        host.run("systemctl stop trimsfs@models")
    if host.takes_over:
        assert "exit" not in said
        assert "same" not in said
        record_property("cell", "yes: open files read on")
    else:
        assert "before Linux 6.9 no server can take over a mount: run `mountctl down` and `mountctl up`" in said
        assert "same" in said
        record_property("cell", "no: refused, and says what to do")


@pytest.mark.usefixtures("declared")
@pytest.mark.feature(Feature.KILL)
def test_kill(host: Host, record_property: Cell) -> None:
    try:
        said = host.run(f"""
            exec 3< /models/model
            kill -9 $({SERVER})
            if cmp /store/model - <&3; then echo open file; fi
            exec 3<&-
            for try in $(seq 120); do
                if cmp /store/model /models/model; then echo again; break; fi
                sleep 1
            done
            journalctl -q -b -u trimsfs@models -o cat
        """)
    finally:
        host.run("systemctl stop trimsfs@models")
    assert "again" in said
    assert "Traceback" not in said
    assert ("open file" in said) >= host.takes_over
    record_property("cell", "yes: open files read on" if host.takes_over else "systemd mounts anew")


@pytest.mark.usefixtures("declared")
@pytest.mark.feature(Feature.UPGRADE)
def test_upgrade(host: Host, record_property: Cell) -> None:
    upgrade = UPGRADE[host.kind.install == BY_PACKAGE]
    try:
        said = host.run(f"""
            exec 3< /models/model
            before=$({SERVER})
            {{ {upgrade}
            }} 2>&1 || echo "exit $?"
            cmp /store/model - <&3
            cmp /store/model /models/model
            if test "$before" = "$({SERVER})"; then echo same server; fi
        """)
    finally:
        host.run("systemctl stop trimsfs@models")
    assert "Traceback" not in said
    assert ("same server" in said) != host.takes_over
    if host.takes_over:
        record_property("cell", "yes: open files read on")
    else:
        assert "before Linux 6.9 no server can take over a mount: run `mountctl down` and `mountctl up`" in said
        record_property("cell", "the old server serves on until `mountctl down`")


@pytest.mark.feature(Feature.USER)
def test_user(host: Host) -> None:
    host.run("""
        id user || useradd --create-home user
        chmod 755 /store /home/user
        runuser -u user -- sh -euxc '
            cd && mkdir -p models
            trimsfs mount /store ~/models
            cmp /store/model models/model
            trimsfs umount ~/models'
    """)


@pytest.mark.feature(Feature.CONTAINER)
def test_container(host: Host) -> None:
    said = host.run("""
        mkdir -p /container/bin /container/model
        cp /bin/busybox /container/bin
        trimsfs mount /store /models
        podman run --rm --network none --runtime crun --cgroups disabled --log-driver none \
            -v /models:/model:ro --rootfs /container /bin/busybox sha256sum /model/model
        sha256sum < /store/model
        trimsfs umount /models
    """)
    inside, outside = (line.split()[0] for line in said.splitlines()[-2:])
    assert inside == outside


@pytest.mark.feature(Feature.FSTAB)
def test_fstab(host: Host) -> None:
    host.run("""
        mkdir -p /fstab
        echo '/store /fstab trimsfs cache_dir=/var/cache/trimsfs/fstab,noauto,nofail 0 0' >> /etc/fstab
        mount /fstab
        cmp /store/model /fstab/model
        umount /fstab
        test -z "$(findmnt -t fuse.trimsfs)"
    """)


@pytest.mark.feature(Feature.TENANTS)
def test_tenants(host: Host) -> None:
    host.machine.write("/tenants.toml", TENANTS)
    said = host.run("""
        id user || useradd --create-home user
        trimsfs mount /store /models --config /tenants.toml --cache-size 64MiB
        cmp /store/other /models/other
        runuser -u user -- cmp /store/model /models/model
        runuser -u user -- cat /models/other 2>&1 > /dev/null || true
        grep trimsfs_disk_tenant /models/.trims/metrics
        trimsfs umount /models
    """)
    assert "/models/other: Permission denied" in said
    assert 'tenant="many"' in said


@pytest.mark.feature(Feature.MEMORY_HIGH)
def test_memory_high(host: Host) -> None:
    host.run("""
        trimsfs mount /store /models
        systemd-run --quiet --wait --collect -p MemoryHigh=12M -p MemoryMax=64M -p MemorySwapMax=0 \
            cmp /store/model /models/model
        trimsfs umount /models
    """)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("ext4", marks=pytest.mark.feature(Feature.EXT4)),
        pytest.param("xfs", marks=pytest.mark.feature(Feature.XFS)),
        pytest.param("btrfs", marks=pytest.mark.feature(Feature.BTRFS)),
    ],
)
def test_file_systems(host: Host, kind: str) -> None:
    host.run(f"""
        rm -f /disk && truncate -s 400M /disk && mkfs.{kind} -q /disk
        mkdir -p /cache && mount -o loop /disk /cache
        trimsfs mount /store /models --cache-dir /cache/models --min-free 0
        cd /models && {CHECK} && {CHECK}
        trimsfs pin model
        cd / && trimsfs umount /models
        trimsfs mount /store /models --cache-dir /cache/models --min-free 0
        cd /models && {CHECK}
        grep -x 'trimsfs_fetch_fetched_bytes_total 0.0' .trims/metrics
        cd / && trimsfs umount /models
        umount /cache
    """)


@pytest.mark.feature(Feature.BOOT)
def test_boot(host: Host, tmp_path: Path) -> None:
    with s3_store(tmp_path) as (endpoint, variables):
        host.machine.write(
            "/etc/systemd/system/trimsfs@away.service.d/credentials.conf", f"[Service]\nEnvironment={variables}\n"
        )
        host.machine.write(
            "/etc/trimsfs/mounts.d/away.toml",
            f"""
            mountpoint = "/away"
            store = "s3://bucket"
            endpoint_url = "{endpoint}"
            cache_dir = "/var/cache/trimsfs/away"
            """,
        )
        host.machine.write("/etc/systemd/system/reader.service", READER)
        # One after the other: three at once take a machine longer than a server may take to start.
        for unit, earlier in (("trimsfs@models", "fstab.mount"), ("trimsfs@away", "trimsfs@models.service")):
            host.machine.write(f"/etc/systemd/system/{unit}.service.d/order.conf", f"[Unit]\nAfter={earlier}\n")
        host.run("""
            mkdir -p /away /fstab
            cp /models.toml /etc/trimsfs/mounts.d
            sed -i /fstab/d /etc/fstab
            options=cache_dir=/var/cache/trimsfs/fstab,nofail,x-systemd.mount-timeout=900
            echo "/store /fstab trimsfs $options 0 0" >> /etc/fstab
            systemctl daemon-reload
            systemctl enable trimsfs@models trimsfs@away reader
            systemctl start trimsfs@away
            sha256sum /away/model
            sync
        """)
    host.machine.reboot()  # the store of /away has ended
    said = host.run("""
        systemctl --failed --no-legend
        echo --
        sha256sum /store/model
        cat /read || true
        journalctl -q -b -u 'trimsfs@*' -u fstab.mount -u reader -o cat
        systemctl disable --now reader trimsfs@models trimsfs@away
        sed -i /fstab/d /etc/fstab
        umount /fstab || true
    """)
    failed, _, rest = said.partition("--\n")
    assert failed == "", rest
    stored, *read = (line.split()[0] for line in rest.splitlines()[:4])
    assert read[:2] == [stored, stored]
    assert len(read[2]) == 64
    assert "Traceback" not in rest


def test_nothing_that_was_logged_is_for_developers(host: Host) -> None:
    said = host.run("journalctl -q -o cat -u 'trimsfs*' --grep 'Traceback|internal error' || true; dmesg | tail -50")
    assert "Traceback" not in said
    assert "internal error" not in said
    assert "BUG:" not in said
