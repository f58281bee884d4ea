"""What an upgrade relies on: names by which keepers of other versions start programs, and what they hand over."""

import base64
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from mountctl.linux.mounting import MountIdentity
from tests.support.keeper_in_process import ORDER
from trimsfs.filesystem.handles import Handles
from trimsfs.handover.connection_settings import ConnectionSettings
from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.namespace.inodes import InodeKind, Inodes
from trimsfs.options import MountOptions, keeper_order
from trimsfs.types import Generation

EARLIER_LEDGER = (
    "c-ku|%FHcJD>h;v6Er|+CMbPeed)$4N?}HfP`*5rj#f&^EJ{r-$uFu@(oq0$^g%Qb=auH<#4=FJ{<Q}gWNPj7RA792xc&J_SwQ<?mgnZDq~<"
    "_f5REDlqhuHZ5;oOQFo!xXmT3D$xVIKgR=uIa4CQ;m?N83nD=Es)QAo?oNyTtQW?ou8SuSya((GvBj0}uKg&#~mGh834e+1Ct)t7*NCNw^}e"
    "m@-gS<z^iJ2;^<JY3N9A3#&jfX0u6($z`@iN(bw8AbV}=^08^3MECQslX7<FH0@TNvs44q$TDQgG6%kOY=%nQ{wZAfr6IcsL3n=GL;Mr($YY"
    "YQk0rjTAY{z6aqy^Edyl$0LNu&a{"
)
"""The slots of a ledger as an earlier version left it, deflated, in base 85: an object's inode, its directory and a
control file, two open directories, an expected reopen, and the settings of the connection."""


@pytest.mark.parametrize("module", ["trimsfs.daemon", "mountctl.keeper"])
def test_programs_keep_the_names_by_which_other_versions_start_them(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {module}" in done.stdout


def test_an_order_says_what_keepers_of_other_versions_read() -> None:
    order = keeper_order(Path("/models"), MountOptions().resolved(Path("/models")), foreground=False)
    assert order["server"] == [sys.executable, "-m", "trimsfs.daemon"]
    assert order.keys() == ORDER.keys()
    assert {"cache_dir", "log_file"} <= order["options"].keys()
    assert MountIdentity(device="0:51", control=7) == MountIdentity("0:51", 7)  # as a service manager has it


def test_a_ledger_of_an_earlier_version_says_what_it_said() -> None:
    memory = os.memfd_create("test")
    os.ftruncate(memory, 1 << 20)
    os.pwrite(memory, zlib.decompress(base64.b85decode(EARLIER_LEDGER)), 0)
    ledger = Ledger(memory)
    inodes, handles = Inodes(ledger), Handles(ledger)
    generation = Generation(key="dir/model", etag='"1"', size=5, modified_ns=7)
    directory, file, control = (
        inodes[number] for number in (3627124846802315207, 2607089941355741613, 3231374047836441364)
    )

    assert (directory.kind, directory.path, directory.lookups) == (InodeKind.DIRECTORY, "dir/", 1)
    assert (file.kind, file.path, file.generation, file.lookups) == (InodeKind.OBJECT, "dir/model", generation, 2)
    assert (control.kind, control.control, control.lookups) == (InodeKind.CONTROL_FILE, "info", 3)
    assert handles.restore(inodes) == {1: directory, 2: directory}
    assert [handles.resent(request) for request in (78, 77)] == [None, 1]
    assert [(record.number, record.content) for record in ledger.inherited(RecordKind.REOPEN)] == [(5, b"dir/model")]
    assert ConnectionSettings.read(ledger) == ConnectionSettings(
        passthrough=True, overlay=False, mounted_ns=9, init="00ff", refusal=None
    )
