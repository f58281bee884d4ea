"""What programs, operators and the world do, in any order, and what must come of it by the reference model.

Two drivers carry it out: one on a server without FUSE, with time that is not real; one on a real mount.
"""

import errno
import functools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from tests.reliability import Survival
from tests.reliability.model import File, Model, Version

PATHS = ("a", "b", "d/x", "d/y", "e", "e/f")
"""Objects, one of which is sometimes a directory."""
DIRECTORIES = ("", "d", "e")
ABSENT = ("absent", "d/absent")
ATTRIBUTES = ("etag", "generation", "pinned", "residency", "verified")


COMMANDS = ("warm-disk", "warm-host", "evict", "pin", "unpin")
PLACES = st.integers(0, 15)
"""Where to look, in sixteenths."""
DOCUMENTED = ("EACCES", "EFAULT", "EIO", "EISDIR", "ENOENT", "ENOTDIR", "ESTALE")


class Driver(Protocol):
    """Does things to a store and to a mount. Raises OSError as a program would meet it."""

    chunk_size: int
    budget: int
    most_restarts: int
    ttl_s: float
    slack_s: float

    def now(self) -> float: ...
    def write(self, path: str, content: bytes) -> None: ...
    def remove(self, path: str) -> None: ...
    def fail(self, number: int) -> None: ...
    def heal(self) -> None: ...

    def open(self, path: str) -> int: ...
    def size(self, token: int) -> int: ...
    def whole(self, token: int) -> bool: ...
    def read(self, token: int, offset: int, size: int) -> bytes: ...
    def map(self, token: int) -> None: ...
    def read_mapped(self, token: int, offset: int, size: int) -> bytes: ...
    def close(self, token: int) -> None: ...
    def unmap(self, token: int) -> None: ...
    def stat(self, path: str) -> int | None: ...
    def listing(self, path: str) -> set[str]: ...
    def attribute(self, path: str, name: str) -> str: ...
    def command(self, name: str, path: str) -> dict[str, Any]: ...
    def models(self) -> list[dict[str, Any]]: ...

    def forget(self) -> None: ...
    def wait(self, share: float) -> None: ...
    def kill(self) -> None: ...
    def remount(self, draw: random.Random, *, damage: bool) -> None: ...
    def check(self) -> list[dict[str, Any]]: ...
    def settle(self) -> None: ...
    def stop(self) -> None: ...


@contextmanager
def survival(fault: str, survived: Callable[[Survival], None]) -> Iterator[None]:
    """Add what machines do in the block to the table."""
    totals = Machine.totals
    totals.clear()
    yield
    faults = ("restarts", "store fails", "replaced", "evict done")
    survived(
        Survival(
            fault=fault,
            injected=sum(totals[name] for name in faults),
            operations=sum(totals[name] for name in ("opens", "reads", "stats", "listings", *DOCUMENTED)),
            errors=Counter({name: number for name, number in totals.items() if name in DOCUMENTED}),
            allowed=DOCUMENTED,
        )
    )


@functools.cache
def _pool(size: int) -> bytes:
    return random.Random(7).randbytes(size)


class Machine(RuleBasedStateMachine):
    """Whatever happens: an open file is of one version, names lead to what was there of late, nothing in use goes."""

    opened: Bundle[File] = Bundle("opened")
    totals: ClassVar[Counter[str]] = Counter()
    """What was done and met, by all machines."""

    driver: Driver

    def start(self, driver: Driver) -> None:
        """Begin with an empty store; for a rule that is run first."""
        self.driver = driver
        self.model = Model(driver.now, ttl_s=driver.ttl_s, slack_s=driver.slack_s)
        self.pinned: dict[str, str] = {}
        self.damaged: set[str] = set()
        self.files: list[File] = []
        self.versions = self.restarts = self.failing_steps = 0
        for path in PATHS[::2]:
            self.put(path, 2, 0)

    # The store

    @rule(
        path=st.sampled_from(PATHS), chunks=st.sampled_from((0, 1, 1, 2, 3)), more=st.sampled_from((-1, 0, 0, 1, 700))
    )
    def put(self, path: str, chunks: int, more: int) -> None:
        """Make an object or replace it, also in place of a directory or below what was an object."""
        for other in sorted(self.model.current):
            if other.startswith(f"{path}/") or path.startswith(f"{other}/"):
                self.delete(other)
        size = max(0, chunks * self.driver.chunk_size + more)
        self.versions += 1
        self.totals["replaced"] += path in self.model.current
        shift = self.versions * 16
        version = Version(path, _pool(4 * self.driver.chunk_size + (1 << 20))[shift : shift + size])
        self.driver.write(path, version.content)
        self.model.put(version)

    @precondition(lambda self: len(self.model.current) > 2)
    @rule(path=st.sampled_from(PATHS))
    def delete(self, path: str) -> None:
        if path in self.model.current:
            self.driver.remove(path)
            self.model.delete(path)

    @rule(file=opened, chunks=st.integers(0, 3))
    def replace(self, file: File, chunks: int) -> None:
        """Replace what somebody has open."""
        self.put(file.path, chunks, 17)

    @precondition(lambda self: not self.model.failing)
    @rule(number=st.sampled_from((errno.EIO, errno.EACCES)), steps=st.integers(1, 4))
    def fail(self, number: int, steps: int) -> None:
        """The store is away, or refuses the credentials, for some steps."""
        self.driver.fail(number)
        self.model.fail(number)
        self.failing_steps = steps
        self.totals["store fails"] += 1

    def heal(self) -> None:
        """The store is well again."""
        self.driver.heal()
        self.model.heal()

    @invariant()
    def failures_end(self) -> None:
        if self.model.failing:
            self.failing_steps -= 1
            if self.failing_steps < 0:
                self.heal()

    # Programs

    @rule(target=opened, path=st.sampled_from(PATHS))
    def open(self, path: str) -> "File | MultipleResults[File]":
        begun = self.driver.now()
        try:
            token = self.driver.open(path)
        except OSError as error:
            self.name_failed(error, path, begun)
            return multiple()
        possible = self.model.believable(path, begun)
        size = self.driver.size(token)
        file = File(path, token, [version for version in possible if version.size == size])
        assert file.candidates, f"{path}: opened, {size} bytes long, and of no version: {possible}"
        self.files.append(file)
        self.totals["opens"] += 1
        return file

    @rule(path=st.sampled_from(PATHS))
    def load(self, path: str) -> None:
        """What most programs do: read all of it, and close it."""
        file = self.open(path)
        if isinstance(file, File):
            self.look(file, "read", 0, 1 << 30)
            self.let_go(file)

    @rule(path=st.sampled_from(PATHS), place=PLACES)
    def load_a_part(self, path: str, place: int) -> None:
        """Read a header, or what is behind it."""
        file = self.open(path)
        if isinstance(file, File):
            self.read(file, place, 4096)
            self.let_go(file)

    @rule(path=st.sampled_from(PATHS), place=PLACES)
    def load_mapped(self, path: str, place: int) -> None:
        """Map it, close it, and look at the mapping."""
        file = self.open(path)
        if isinstance(file, File):
            self.map(file)
            self.driver.close(file.token)
            file.closed = True
            if file.mapped:
                self.touch(file, place, 1 << 15)
            self.let_go(file)

    @rule(file=opened, place=PLACES, size=st.sampled_from((1, 700, 4096, 1 << 15, 1 << 30)))
    def read(self, file: File, place: int, size: int) -> None:
        if file.closed:
            return
        offset = file.candidates[0].size * place // 16
        self.look(file, "read", offset, size)

    @rule(file=opened)
    def map(self, file: File) -> None:
        if not file.closed and not file.mapped and file.candidates[0].size:
            self.driver.map(file.token)
            file.mapped = True

    @rule(file=opened, place=PLACES, size=st.sampled_from((1, 4096, 1 << 15, 1 << 30)))
    def touch(self, file: File, place: int, size: int) -> None:
        """Look at a mapping, also of a file that has been closed since."""
        if file.mapped:
            offset = file.candidates[0].size * place // 16
            self.look(file, "read_mapped", offset, min(size, file.candidates[0].size - offset))

    def look(self, file: File, how: str, offset: int, size: int) -> None:
        begun = self.driver.now()
        whole = not file.closed and self.driver.whole(file.token)
        assert whole or not file.whole or file.closed, f"{file.path}: what is open has been evicted"
        file.whole |= whole
        try:
            data = getattr(self.driver, how)(file.token, offset, size)
        except OSError as error:
            self.look_failed(error, file, begun, mapped=how == "read_mapped")
        else:
            file.saw(offset, size, data)
            self.totals["reads"] += 1

    def look_failed(self, error: OSError, file: File, begun: float, *, mapped: bool) -> None:
        """Content could not be seen: only for want of a store, or of that version in it, and of the bytes here."""
        assert not file.whole, f"{file.path}: all of it is here, and {error!r}"
        allowed = self.model.errors(begun, names=False)
        if any(version is not self.model.current.get(file.path) for version in file.candidates):
            allowed = allowed | {errno.ESTALE}
        if mapped and allowed:
            allowed = {errno.EFAULT}  # a program would get SIGBUS
        assert error.errno in allowed, f"{file.path}: {error!r}"
        self.totals[errno.errorcode[error.errno or 0]] += 1

    @rule(file=consumes(opened), keep=st.booleans(), target=opened)
    def close(self, file: File, keep: bool) -> "File | MultipleResults[File]":
        """Close a file, and its mapping unless that is to stay."""
        if file.mapped and keep:
            if not file.closed:
                self.driver.close(file.token)
                file.closed = True
            return file
        if file in self.files:  # or it has been closed to unmount
            self.let_go(file)
        return multiple()

    def let_go(self, file: File) -> None:
        if not file.closed:
            self.driver.close(file.token)
        if file.mapped:
            self.driver.unmap(file.token)
        self.files.remove(file)

    @rule(path=st.sampled_from((*PATHS, *ABSENT)), what=st.sampled_from((*DIRECTORIES, *ATTRIBUTES, "", "", "")))
    def ask(self, path: str, what: str) -> None:
        """Look at names without opening anything."""
        if what in ATTRIBUTES:
            self.attribute(path, what)
        elif what in DIRECTORIES and what:
            self.listing(what)
        else:
            self.stat(path)
            self.listing(path.rpartition("/")[0])

    def stat(self, path: str) -> None:
        begun = self.driver.now()
        try:
            size = self.driver.stat(path)
        except OSError as error:
            self.name_failed(error, path, begun)
            return
        if size is None:
            assert self.model.may_be_directory(path, begun), f"{path}: a directory, and was none"
        else:
            sizes = [version.size for version in self.model.believable(path, begun)]
            assert size in sizes, f"{path}: {size} bytes long, and was {sizes}"
        self.totals["stats"] += 1

    def listing(self, path: str) -> None:
        begun = self.driver.now()
        try:
            names = self.driver.listing(path)
        except OSError as error:
            self.name_failed(error, path, begun)
            return
        assert self.model.may_list(path, names, begun), f"/{path} held {names} at no time"
        self.totals["listings"] += 1

    def attribute(self, path: str, name: str) -> None:
        begun = self.driver.now()
        try:
            value = self.driver.attribute(path, name)
        except OSError as error:
            if error.errno == errno.ENODATA:
                assert self.model.may_be_directory(path, begun)
            else:
                self.name_failed(error, path, begun)
            return
        assert value
        if name == "pinned" and not any(pinned == path for pinned in self.pinned.values()):
            assert value == "false"

    def name_failed(self, error: OSError, path: str, begun: float) -> None:
        """An operation on a name has failed: only as it may."""
        reasons = {
            errno.ENOENT: self.model.may_be_absent,
            errno.ENOTDIR: self.model.may_be_no_directory,
            errno.EISDIR: self.model.may_be_directory,
        }
        number = error.errno or 0
        reason = reasons.get(number)
        may = reason(path, begun) if reason is not None else number in self.model.errors(begun, names=True)
        assert may, f"{path}: {error!r}"
        self.totals[errno.errorcode[number]] += 1

    # Operators

    @rule(
        path=st.sampled_from((*PATHS, "d")), name=st.sampled_from(("warm-disk", "warm-host", "evict", "pin", "unpin"))
    )
    def command(self, path: str, name: str) -> None:
        """Give a command for a file or a directory."""
        if name == "pin":
            self.pin(path)
        elif name == "unpin":
            self.unpin(path)
        else:
            self.warm_or_evict(path, name)

    def warm_or_evict(self, path: str, name: str) -> None:
        begun = self.driver.now()
        done = self.commanded(name, path)
        if done and name != "evict":
            sizes = [version.size for version in self.model.believable(path, begun)]
            assert (
                self.model.may_be_directory(path, begun)
                or any(
                    model["path"] == path and model["residency"]["disk"] == model["size"] in sizes
                    for model in self.driver.models()
                )
                or 0 in sizes
            ), f"{path} is not here"

    def pin(self, path: str) -> None:
        self.commanded("pin", path)
        pinned = self.pins()
        assert self.pinned.items() <= pinned.items()
        new = [key for token, key in pinned.items() if token not in self.pinned]
        assert all(key == path or key.startswith(f"{path}/") for key in new), new
        self.pinned = pinned

    def unpin(self, path: str) -> None:
        if self.commanded("unpin", path):
            left = {t: key for t, key in self.pinned.items() if key != path and not key.startswith(f"{path}/")}
            assert self.pins() == left
            self.pinned = left

    def commanded(self, name: str, path: str) -> bool:
        """Give a command: whether it was carried out, and else only for a reason that there is."""
        begun = self.driver.now()
        try:
            last = self.driver.command(name, path)
        except OSError as error:
            self.name_failed(error, path, begun)
            return False
        self.totals[f"{name} {last['state']}"] += 1
        if last["state"] == "done":
            return True
        kind, failing = last["kind"], self.model.errors(begun, names=True)
        below = [file for file in self.files if file.path == path or file.path.startswith(f"{path}/")]
        stale = any(
            version is not self.model.current.get(version.path)
            for version in self.model.ever()
            if version.path == path or version.path.startswith(f"{path}/")
        )
        pinned = any(key == path or key.startswith(f"{path}/") for key in self.pinned.values())
        reasons = {
            "InUseError": name == "evict" and (bool(below) or pinned),
            "CacheFullError": name != "evict",
            "ObjectChangedError": stale,
            "StoreUnavailableError": errno.EIO in failing,
            "BucketNotFoundError": errno.EIO in failing,
            "StoreAccessError": errno.EACCES in failing,
        }
        assert reasons.get(kind, False), f"{name} {path}: {last}"
        return False

    # Time, memory, the host

    @rule(share=st.sampled_from((0.0, 0.1, 1.1, 5.0)))
    def pause(self, share: float) -> None:
        """Let some part of what names are believed for pass, or more than that; or the kernel be short of memory."""
        if share:
            self.driver.wait(share)
        else:
            self.driver.forget()

    @precondition(lambda self: self.restarts < self.driver.most_restarts)
    @rule(how=st.sampled_from(("kill", "remount", "damage")), draw=st.randoms(use_true_random=False))
    def restart(self, how: str, draw: random.Random) -> None:
        """The server dies, and another goes on; or all is closed and mounted again, on a cache that may be damaged."""
        self.restarts += 1
        self.totals["restarts"] += 1
        if how == "kill":
            self.driver.kill()
            return
        if self.model.failing:
            self.heal()
        for file in list(self.files):
            self.let_go(file)
            file.closed, file.mapped = True, False
        self.driver.remount(draw, damage=how == "damage")
        self.damaged |= set(self.pinned) if how == "damage" else set()

    # What always holds

    @invariant()
    def nothing_in_use_has_gone(self) -> None:
        models = self.driver.check()
        assert self.pins(models) == self.pinned
        kept = sum(model["residency"]["disk"] for model in models)
        assert kept <= self.driver.budget
        for model in models:
            whole = model["residency"]["disk"] == model["size"]
            excused = not model["pinned"] or model["generation"] in self.damaged
            assert whole or excused, f"{model['path']} is pinned, and has gone"
        for file in self.files:
            if file.whole and not file.closed:
                assert self.driver.whole(file.token), f"{file.path} is open, and has been evicted"

    def pins(self, models: list[dict[str, Any]] | None = None) -> dict[str, str]:
        """What is pinned, by generation."""
        models = self.driver.models() if models is None else models
        return {model["generation"]: model["path"] for model in models if model["pinned"]}

    def teardown(self) -> None:
        """All can be read in the end; once it is closed nothing is left in use, and every inode goes back."""
        try:
            if sys.exc_info()[0] is None:  # or it would hide what has failed
                if self.model.failing:
                    self.heal()
                for path in PATHS:
                    self.load(path)
                for directory in DIRECTORIES:
                    self.listing(directory)
                for file in list(self.files):
                    self.let_go(file)
                self.driver.settle()
        finally:
            self.driver.stop()
