"""What programs, operators and the world do, in any order, and what must come of it by the reference model.

Two drivers carry it out: one on a server without FUSE, with time that is not real; one on a real mount.
"""

import errno
import functools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.reliability.model import File, Model, Version
from tests.reliability.real import RealDriver
from tests.reliability.virtual import VirtualDriver

T = TypeVar("T")
Driver = RealDriver | VirtualDriver
"""Does things to a store and to a mount. Raises OSError as a program would meet it."""
PATHS = ("a", "b", "d/x", "d/y", "e", "e/f")
"""Objects, one of which is sometimes a directory."""
WHICH = st.integers(0, 3)
DIRECTORIES = ("", "d", "e")
ABSENT = ("absent", "d/absent")
ATTRIBUTES = ("etag", "generation", "pinned", "residency", "verified")
COMMANDS = ("warm-disk", "warm-host", "evict", "pin", "unpin")
PLACES = st.integers(0, 15)
"""Where to look, in sixteenths."""
MOST_OPEN = 5


@functools.cache
def _pool(size: int) -> bytes:
    return random.Random(7).randbytes(size)


class Machine(RuleBasedStateMachine):
    """Whatever happens: an open file is of one version, names lead to what was there of late, nothing in use goes.

    Which rules there are must not depend on what comes of them.
    """

    totals: ClassVar[Counter[str]] = Counter()
    """What was done and met, by all machines."""

    driver: Driver

    def start(self, driver: Driver) -> None:
        """Begin with a few objects; for a rule that is run first."""
        self.driver = driver
        self.model = Model(driver.now, ttl_s=driver.ttl_s, slack_s=driver.slack_s)
        self.files: list[File] = []
        self.pinned: dict[str, str] = {}
        self.damaged: set[str] = set()
        self.versions = self.failing_steps = self.restarts = 0
        for path in PATHS[::2]:
            self.put(path, 2, 0)

    # The store, whose objects come, change and go, and which fails at times

    @rule(
        path=st.sampled_from(PATHS), chunks=st.sampled_from((0, 1, 1, 2, 3)), more=st.sampled_from((-1, 0, 0, 1, 700))
    )
    def put(self, path: str, chunks: int, more: int) -> None:
        """Make an object or replace it, also in place of a directory or below what was an object."""
        for other in sorted(self.model.current):
            if other.startswith(f"{path}/") or path.startswith(f"{other}/"):
                self.remove(other)
        size = max(0, chunks * self.driver.chunk_size + more)
        self.versions += 1
        self.totals["replaced"] += path in self.model.current
        shift = self.versions * 16
        version = Version(path, _pool(4 * self.driver.chunk_size + (1 << 20))[shift : shift + size])
        self.driver.write(path, version.content)
        self.model.put(version)

    @rule(path=st.sampled_from(PATHS))
    def delete(self, path: str) -> None:
        """Delete an object, unless hardly any is left."""
        if len(self.model.current) > 2:
            self.remove(path)

    def remove(self, path: str) -> None:
        if path in self.model.current:
            self.driver.remove(path)
            self.model.delete(path)

    @rule(which=WHICH, chunks=st.integers(0, 3))
    def replace(self, which: int, chunks: int) -> None:
        for file in self.chosen(which):
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
        self.driver.heal()
        self.model.heal()

    @invariant()
    def failures_end(self) -> None:
        if self.model.failing:
            self.failing_steps -= 1
            if self.failing_steps < 0:
                self.heal()

    def chosen(self, which: int) -> list[File]:
        return [self.files[which % len(self.files)]] if self.files else []

    # Programs

    def opened(self, path: str) -> Iterator[File]:
        """Open a file, if it can be."""
        for begun, token in self.answered(path, self.driver.open, path):
            possible = self.model.believable(path, begun)
            size = self.driver.size(token)
            file = File(path, token, [version for version in possible if version.size == size])
            assert file.candidates, f"{path}: opened, {size} bytes long, and of no version: {possible}"
            self.files.append(file)
            self.totals["opens"] += 1
            yield file

    @rule(path=st.sampled_from(PATHS))
    def open(self, path: str) -> None:
        """Open a file that stays open, for as long as there are not too many."""
        for file in self.files[MOST_OPEN:]:
            self.let_go(file)
        list(self.opened(path))

    @rule(path=st.sampled_from(PATHS))
    def load(self, path: str) -> None:
        """What most programs do: read all of it, and close it."""
        for file in self.opened(path):
            self.look(file, "read", 0, 1 << 30)
            self.let_go(file)

    @rule(path=st.sampled_from(PATHS), place=PLACES)
    def load_a_part(self, path: str, place: int) -> None:
        """Read a header, or what is behind it."""
        for file in self.opened(path):
            self.read(file, place, 4096)
            self.let_go(file)

    @rule(path=st.sampled_from(PATHS), place=PLACES)
    def load_mapped(self, path: str, place: int) -> None:
        """Map it, close it, and look at the mapping."""
        for file in self.opened(path):
            self.map(file)
            self.driver.close(file.token)
            file.closed = True
            self.touch(file, place, 1 << 15)
            self.let_go(file)

    @rule(which=WHICH, place=PLACES, size=st.sampled_from((1, 700, 4096, 1 << 15, 1 << 30)))
    def use(self, which: int, place: int, size: int) -> None:
        """Read a file, or look at its mapping, which may be all that is left."""
        for file in self.chosen(which):
            self.read(file, place, size)
            self.touch(file, place, size)

    def read(self, file: File, place: int, size: int) -> None:
        if not file.closed:
            self.look(file, "read", file.candidates[0].size * place // 16, size)

    def touch(self, file: File, place: int, size: int) -> None:
        if file.mapped:
            offset = file.candidates[0].size * place // 16
            self.look(file, "read_mapped", offset, min(size, file.candidates[0].size - offset))

    @rule(which=WHICH)
    def map_one(self, which: int) -> None:
        for file in self.chosen(which):
            self.map(file)

    def map(self, file: File) -> None:
        if not file.closed and not file.mapped and file.candidates[0].size:
            self.driver.map(file.token)
            file.mapped = True

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

    @rule(which=WHICH, keep=st.booleans())
    def close(self, which: int, keep: bool) -> None:
        """Close a file, and its mapping unless that is to stay."""
        for file in self.chosen(which):
            if not file.mapped or not keep:
                self.let_go(file)
            elif not file.closed:
                self.driver.close(file.token)
                file.closed = True

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
        for begun, size in self.answered(path, self.driver.stat, path):
            if size is None:
                assert self.model.may_be_directory(path, begun), f"{path}: a directory, and was none"
            else:
                sizes = [version.size for version in self.model.believable(path, begun)]
                assert size in sizes, f"{path}: {size} bytes long, and was {sizes}"
            self.totals["stats"] += 1

    def listing(self, path: str) -> None:
        for begun, names in self.answered(path, self.driver.listing, path):
            assert self.model.may_list(path, names, begun), f"/{path} held {names} at no time"
            self.totals["listings"] += 1

    def attribute(self, path: str, name: str) -> None:
        for _, value in self.answered(path, self.driver.attribute, path, name):
            assert value
            if name == "pinned" and path not in self.pinned.values():
                assert value == "false"

    def answered(self, path: str, call: Callable[..., T], *arguments: str) -> Iterator[tuple[float, T]]:
        """When an operation on a name began, and what it gives, if it does not fail as it may."""
        begun = self.driver.now()
        try:
            value = call(*arguments)
        except OSError as error:
            if error.errno == errno.ENODATA and call != self.driver.attribute:
                raise
            self.name_failed(error, path, begun)
        else:
            yield begun, value

    def name_failed(self, error: OSError, path: str, begun: float) -> None:
        reasons = {
            errno.ENOENT: self.model.may_be_absent,
            errno.ENOTDIR: self.model.may_be_no_directory,
            errno.EISDIR: self.model.may_be_directory,
            errno.ENODATA: self.model.may_be_directory,
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
        if name == "pin":
            self.pin(path)
        elif name == "unpin":
            self.unpin(path)
        else:
            self.warm_or_evict(path, name)

    def warm_or_evict(self, path: str, name: str) -> None:
        begun = self.driver.now()
        done = self.commanded(name, path)
        if done and name != "evict" and self.driver.keeps_idle:
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
        for begun, last in self.answered(path, self.driver.command, name, path):
            self.totals[f"{name} {last['state']}"] += 1
            if last["state"] == "done":
                return True
            self.command_failed(name, path, begun, last)
        return False

    def command_failed(self, name: str, path: str, begun: float, last: dict[str, Any]) -> None:
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
        self.driver.remount(draw, damage=how == "damage")
        self.damaged |= set(self.pinned) if how == "damage" else set()

    # What always holds

    @invariant()
    def nothing_in_use_has_gone(self) -> None:
        models = self.driver.check()
        assert self.pins(models) == self.pinned
        kept = {model["generation"]: model["residency"]["disk"] for model in models}
        assert sum(kept.values()) <= self.driver.budget, kept
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
