"""Where files must be what has been signed, nobody gets a copy of anything else on a GPU."""

import errno
import hashlib
import random
from pathlib import Path

import pytest
import xattr

from tests.gpu.scene import MIB, scene
from tests.support.mounts import trimsfs
from tests.support.signing import new_key, pem, sign

CONTENT = random.Random(8).randbytes(3 * MIB + 5)


def test_what_has_not_been_signed_comes_to_no_gpu(tmp_path: Path) -> None:
    key, store = new_key(), tmp_path / "store"
    for directory, files in {"signed": {"net.bin": CONTENT}, "changed": {"net.bin": CONTENT[:-1]}}.items():
        (store / directory).mkdir(parents=True)
        (store / directory / "net.bin").write_bytes(CONTENT)
        (store / directory / "model.sig").write_bytes(sign(key, files))
    (tmp_path / "key.pem").write_bytes(pem(key))
    (tmp_path / "key.pem").chmod(0o600)  # the server reads it before it gives root up
    options = ("signatures=require", f"signing_key={tmp_path}/key.pem")
    with scene(store, tmp_path, *options) as host:
        assert host.borrowing("signed/net.bin").digest() == hashlib.sha256(CONTENT).hexdigest()
        refused = host.program().ask("control_file", path=host.control_file("changed/net.bin"))
        assert refused["errno"] == errno.EACCES
        asked = {"path": str(host.file("changed/net.bin")), "device": host.device, "memory": 0}
        assert host.program().ask("ioctl", **asked)["errno"] == errno.EACCES
        with pytest.raises(PermissionError):
            xattr.getxattr(host.file("changed/net.bin"), f"user.trims.gpu.{host.device}.ipc_handle")
        assert trimsfs("warm", "--to", f"gpu:{host.device}", host.file("changed/net.bin")).returncode == 19
        assert [copy["path"] for copy in host.copies()] == ["signed/net.bin"]
