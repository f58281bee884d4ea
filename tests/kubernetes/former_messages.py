"""Records what a keeper of the former release and its servers say to each other.

``.venv/bin/python -m tests.kubernetes.former_messages`` writes it to tests/support/former_messages.json. Run it as root
at the top of the repository, whose history must reach back to the former release. Run it again, and commit the file,
when `tests.support.former_release` names another release.

Keeper and servers run in crun as in the manifests. Of the keeper, the module that passes messages also writes them
down.
"""

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.kubernetes.manifests import ROOT, pod_of
from tests.kubernetes.pods import STORE, TIMEOUT_S, Container, Pod, a_node
from tests.support.former_release import MESSAGES, former_release
from tests.support.mounts import wait_until

Said = dict[str, Any]
"""A message: whether the ``keeper`` said it, the ``message``, and how many ``descriptors`` came with it."""
Conversation = list[Said]
PODS = {"keeper": "trimsfs-keeper", "server": "trimsfs"}
MODULE = "mountctl/linux/descriptor_passing.py"
RECORDS = "run/trimsfs/messages"
RECORD = f"""

import itertools
import json
import os
import weakref

_send, _receive = send, receive
_connections, _numbers = weakref.WeakKeyDictionary(), itertools.count()


def _record(end, keeper, data, descriptors):
    connection = _connections.setdefault(end, f"{{os.getpid()}}-{{next(_numbers)}}")
    said = dict(keeper=keeper, message=json.loads(data), descriptors=len(descriptors))
    with open("/{RECORDS}", "a") as file:
        file.write(json.dumps([connection, said]) + "\\n")


def send(end, data, descriptors=(), *, flags=0):
    descriptors = list(descriptors)
    _send(end, data, descriptors, flags=flags)
    _record(end, True, data, descriptors)


def receive(end, limit, most):
    received = _receive(end, limit, most)
    if received[0]:
        _record(end, False, received[0], received[1])
    return received
"""
"""What the module does besides in the keeper."""
FILES = {f"model/{number}": bytes(3_000_000) for number in range(3)}


def shape(said: Said) -> tuple[object, ...]:
    """What matters of a message: who said it, its kind, the names of its fields, and those of its descriptors."""
    message = said["message"]
    held = message.get("names", message.get("descriptors", ()))
    return said["keeper"], message.get("type", message.get("do")), tuple(sorted(message)), tuple(sorted(held))


def record(former: Mapping[str, Path], directory: Path) -> list[Conversation]:
    """What is said while servers mount, serve, fail and are replaced, and the keeper is, without repetitions."""
    recording = directory / "recording.py"
    recording.write_text((former[str(ROOT / "mountctl")] / "linux" / Path(MODULE).name).read_text() + RECORD)
    images = {"keeper": {**former, str(ROOT / MODULE): recording}, "server": former}
    (directory / "node").mkdir()
    with a_node(directory / "node", FILES) as node:
        records = node.host / RECORDS

        def start(name: str, *more: str) -> Container:
            pod = Pod(node, name, copy.deepcopy(pod_of(PODS[name])))
            pod.container(name).setdefault("args", []).extend(more)
            return pod.start(name, images[name])

        def followed() -> bool:
            """Whether a launcher that kept the mount has joined the next keeper, and keeps it for that one too."""
            join, _, later = records.read_text().rpartition('"join"')[2].partition("\n")
            return '"ledger"' in join and '"keep"' in later

        keeper = start("keeper").ready()
        assert start("server", "--store=/nowhere").ended() != 0
        first = start("server").serving()
        for name, content in FILES.items():
            assert (node.mountpoint / name).read_bytes() == content
        for kind in ("alive", "backing-close"):
            wait_until(lambda: f'"{kind}"' in records.read_text(), TIMEOUT_S)  # noqa: B023
        first.kill()
        start("server").serving()
        assert start("server", f"--store={STORE}/models/model").ended() != 0  # another store, while one is mounted
        assert keeper.stop() == 0
        start("keeper").ready()
        wait_until(followed, TIMEOUT_S)
        return _conversations(records.read_text())


def _conversations(lines: str) -> list[Conversation]:
    """What is said on each connection. Of exchanges of one shape, a connection has the first alone; a connection that
    has nothing new is left out."""
    every: dict[str, Conversation] = {}
    for line in lines.splitlines():
        connection, said = json.loads(line)
        every.setdefault(connection, []).append(said)
    known: set[tuple[object, ...]] = set()
    fresh: list[Conversation] = []
    for conversation in sorted(every.values(), key=len, reverse=True):
        distinct: dict[tuple[object, ...], Conversation] = {}
        for exchange in _exchanges(conversation):
            distinct.setdefault(tuple(map(shape, exchange)), exchange)
        if distinct.keys() - known:
            fresh.append([said for exchange in distinct.values() for said in exchange])
        known |= distinct.keys()
    return fresh


def _exchanges(conversation: Conversation) -> Iterator[Conversation]:
    """Each message to the keeper, with what the keeper says before the next."""
    exchange: Conversation = []
    for said in conversation:
        if not said["keeper"] and exchange:
            yield exchange
            exchange = []
        exchange.append(said)
    yield exchange


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="k8s-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        MESSAGES.write_text(json.dumps(record(former_release(place), place), indent=1) + "\n")


if __name__ == "__main__":
    main()
