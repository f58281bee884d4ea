"""Names: lookup, forget and readdir, for the store's directories and the control directories."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from trimsfs.control.control_files import SUBJECT, Control
from trimsfs.errors import InvalidRequestError, NameTooLongError, NoSuchEntryError, StaleHandleError
from trimsfs.filesystem.attributes import CONTROL_TTL_S, FOREVER_S, Attributes, Describer
from trimsfs.filesystem.handles import Handles, OpenDirectory
from trimsfs.namespace.alias_targets import AliasTargets
from trimsfs.namespace.inodes import Inode, InodeKind, directory_of
from trimsfs.namespace.listing import CONTROL_NAME, NAME_MAX, Entry, Listing, NonObject
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.reopens import Reopens
from trimsfs.telemetry.tracer import Tracer
from trimsfs.tiers.disk.interfaces import KnownBlobs
from trimsfs.types import Generation, Symlink

log = logging.getLogger(__name__)

ALIAS_AGE_S = 0.5
"""How old the store's answer may be by which a process gets its target of an alias."""
MANY_INODES = 100_000
"""With more inodes, listings give the kernel only names, and it is asked to give up inodes that nothing uses. Each
takes about 800 bytes here, and more in the kernel."""
PRUNED = 250
"""Inodes to look at for each request that the kernel give some up."""


class Names:
    """The tree of names as the kernel sees it, with its ``inodes``."""

    def __init__(
        self,
        namespace: Namespace,
        blobs: KnownBlobs,
        control: Control,
        reopens: Reopens,
        describe: Describer,
        handles: Handles,
        tracer: Tracer,
        aliases: AliasTargets,
        prune: Callable[[Sequence[int]], None],
    ) -> None:
        self._namespace = namespace
        self._aliases = aliases
        self._prune = prune
        self._beyond = 0
        """Lookups counted while there were more than MANY_INODES."""
        self.inodes = namespace.inodes
        self._blobs = blobs
        self._control = control
        self._reopens = reopens
        self._describe = describe
        self._handles = handles
        self._tracer = tracer
        self.replaced_while_open = 0
        """How often the server found a file replaced while programs had files of its directory open."""

    # Inodes

    def attributes(self, number: int) -> Attributes:
        """The attributes of an inode that the kernel knows."""
        return self._describe.inode(self.inodes[number], FOREVER_S)

    def target(self, number: int) -> bytes:
        """The target of a symbolic link. Raises InvalidRequestError for anything else."""
        inode = self.inodes[number]
        if inode.kind is not InodeKind.SYMLINK:
            raise InvalidRequestError(f"{inode.path}: not a symbolic link")
        return os.fsencode(inode.target)

    async def follow(self, number: int, *, thread: int) -> bytes:
        """The target of a symbolic link for a *thread*: that of an alias is its process's own choice.

        Raises NoSuchEntryError when the link is gone.
        """
        inode, target = self.inodes[number], self.target(number)
        if b"/" in target:
            return target  # not the name of a version beside it
        return os.fsencode(await self._aliases.follow(inode.path, thread, partial(self._newest_target, inode)))

    async def _newest_target(self, inode: Inode) -> str:
        """The target of an alias by an answer of the store that is at most ALIAS_AGE_S old."""
        prefix = directory_of(inode.path)
        entry = await self._namespace.recent(prefix, os.fsencode(inode.path[len(prefix) :]), ALIAS_AGE_S)
        if not isinstance(entry, Symlink):
            raise NoSuchEntryError(inode.path)
        version = os.fsencode(entry.target)
        if (await self._namespace.lookup(prefix, version))[0] is NonObject.ABSENT:
            await self._namespace.recent(prefix, version, 0.0)  # it may be newer than that answer
        return entry.target

    def count_lookup(self, attributes: Attributes) -> None:
        """Record that the kernel gets an inode once more; it will `forget` the inode as often."""
        self.inodes.count_lookup(attributes.inode)
        if len(self.inodes) > MANY_INODES:
            self._beyond += 1
            if self._beyond % (PRUNED // 2) == 0:  # prunes more than comes in
                self._prune(self.inodes.never_opened(PRUNED))

    def may_be_counted(self, attributes: Attributes) -> bool:
        """Whether the kernel gets the inode of a listed name, or only the name.

        The kernel rarely gives up an inode by itself, and each takes memory. Beyond MANY_INODES it gets only names, and
        looks up those that programs use.
        """
        return attributes.inode.lookups > 0 or len(self.inodes) <= MANY_INODES

    # Lookup

    async def lookup(self, parent: int, name: bytes, *, thread: int = 0) -> Attributes:
        """Look up a name for a *thread*. Returns its attributes, for which the caller calls `count_lookup`.

        Raises NoSuchEntryError if the name does not exist, NameTooLongError if it is too long for any file.
        """
        directory, began = self.inodes[parent], time.perf_counter()
        if directory.kind is InodeKind.CONTROL_DIRECTORY:
            return await self._lookup_control(directory, name)
        if name == CONTROL_NAME:
            inode = self.inodes.reference(InodeKind.CONTROL_DIRECTORY, directory.path)
            return self._describe.inode(inode, FOREVER_S)
        if len(name) > NAME_MAX:
            raise NameTooLongError(f"the name has {len(name)} bytes: too long for a file name")
        entry, left = await self._namespace.lookup(directory.path, name)
        path = directory.path + os.fsdecode(name)
        if isinstance(entry, Generation) and self._reopens.expected(thread, path) and not self._is_here(entry):
            # The kernel reopens only once: an outdated answer would become the program's error.
            self._namespace.mark_outdated(path)
            entry, left = await self._namespace.lookup(directory.path, name)
        self._tracer.looked_up(thread, path, began)
        return self._answer(directory, name, entry, left)

    def lookup_known(self, parent: int, name: bytes, *, thread: int) -> Attributes | None:
        """`lookup` of a known file or directory of the store, without waiting; None for anything else."""
        directory = self.inodes.get(parent)
        if directory is None or directory.kind is not InodeKind.DIRECTORY or name == CONTROL_NAME:
            return None
        answer = self._namespace.known(directory.path, name)
        if answer is None or answer[0] is NonObject.ABSENT:
            return None
        if self._reopens.expected(thread, directory.path + os.fsdecode(name)):
            return None
        return self._answer(directory, name, *answer)

    def _answer(self, directory: Inode, name: bytes, entry: Entry, left: float) -> Attributes:
        attributes = self._describe.entry(directory.path, name, entry, left)
        attributes.inode.replaced = False  # the store has this content, perhaps again
        return attributes

    def _is_here(self, generation: Generation) -> bool:
        """Whether a generation is known to be on disk as a whole."""
        blob = self._blobs.known(self._blobs.token(generation))
        return blob is not None and blob.complete

    async def _lookup_control(self, directory: Inode, name: bytes) -> Attributes:
        text = os.fsdecode(name)
        control_entry = self._control.find(directory, text)
        if control_entry is not None:
            inode = self.inodes.reference(control_entry[0], directory.path, directory.generation, control_entry[1])
            return self._describe.inode(inode, CONTROL_TTL_S)
        if directory.control:
            return await self._lookup_file_of_extra(directory, text)
        path, generation = directory.path, None
        if name != CONTROL_NAME:
            entry, _ = await self._namespace.lookup(directory.path, name)
            if entry is NonObject.ABSENT or isinstance(entry, Symlink):  # a link's target has control files
                raise NoSuchEntryError(f"{directory.path}{text}")
            path += text if isinstance(entry, Generation) else f"{text}/"
            generation = entry if isinstance(entry, Generation) else None
        inode = self.inodes.reference(InodeKind.CONTROL_DIRECTORY, path, generation, SUBJECT)
        return self._describe.inode(inode, 0.0)  # a command concerns the version that its name leads to then

    async def _lookup_file_of_extra(self, directory: Inode, name: str) -> Attributes:
        if (model := directory.generation) is not None:
            for extra in self._control.extras:
                generation = await extra.find(model, name)
                if generation is not None:
                    inode = self.inodes.reference(InodeKind.OBJECT, generation.key, generation, name)
                    return self._describe.inode(inode, CONTROL_TTL_S)
        raise NoSuchEntryError(f"no control file {name}")

    def replaced(self, inode: Inode) -> None:
        """Make the kernel look up a replaced object and its siblings again, and the server ask the store for them."""
        if inode.replaced or inode.generation is None:
            return
        inode.replaced = True
        log.info("/%s has been replaced in the store", inode.path)
        self._namespace.replaced(inode.generation)

    def tell_replaced(self, prefix: str) -> None:
        """Warn of programs that may mix two versions of a model: they had files of it open when it was replaced."""
        paths = {file.inode.path for file in self._handles.files.values()}
        count = sum(path[: path.rfind("/") + 1] == prefix for path in paths)
        if count:
            self.replaced_while_open += 1
            log.warning(
                "/%s: files were replaced in the store while programs have %d of them open: these programs may mix two "
                "versions: restart them",
                prefix,
                count,
            )

    # Directories

    async def open_directory(self, number: int) -> int:
        """Open a directory: a handle on its current listing."""
        inode = self.inodes[number]
        return self._handles.add_directory(inode, await self._list(inode))

    async def _list(self, inode: Inode) -> Listing:
        return await self._namespace.entries(inode.path) if inode.kind is InodeKind.DIRECTORY else Listing()

    async def list_directory(self, handle: int, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        """The entries of a listing from position *start* on: name, attributes and the position after it.

        The caller calls `count_lookup` for each inode that the kernel gets, `Inodes.discard` for any other. Control
        directories list their files; ``.trims`` itself is in no listing.
        """
        directory = self._handles.directories.get(handle)
        if directory is None:
            raise StaleHandleError(f"handle {handle} is not known")
        inode = directory.inode
        if directory.entries is None:
            directory.entries = await self._list(inode)
        if inode.kind is InodeKind.CONTROL_DIRECTORY:
            return self._list_control(inode, start)
        return self._list_store(directory, directory.entries, start)

    def _list_store(
        self, directory: OpenDirectory, entries: Listing, start: int
    ) -> Iterator[tuple[bytes, Attributes, int]]:
        prefix = directory.inode.path
        believed = self._namespace.believed(prefix, entries)
        for place, (name, entry) in enumerate(entries.items_from(start), start + 1):
            ttl_s = 0.0 if entry is NonObject.UNREADABLE else believed(name)
            yield name, self._describe.entry(prefix, name, entry, ttl_s), place

    def _list_control(self, inode: Inode, start: int) -> Iterator[tuple[bytes, Attributes, int]]:
        for position, name in enumerate(self._control.names(inode)[start:], start + 1):
            kind, control = self._control.find(inode, name) or (InodeKind.CONTROL_FILE, name)
            file = self.inodes.reference(kind, inode.path, inode.generation, control)
            yield name.encode(), self._describe.inode(file, CONTROL_TTL_S), position
