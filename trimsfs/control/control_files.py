"""The control files below ``.trims``, by name.

A ``files``, ``info`` or ``jobs`` file only reports. A command file acts: an open starts the command, each read returns
a line of JSON with its progress, a close cancels it. So a command ends with the process that gave it.
``background-COMMAND`` starts a job, which only an open of ``cancel-ID`` in its directory, or one above, cancels.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from trimsfs.control.authorisation import Authorisation, Caller
from trimsfs.control.commands import Commands
from trimsfs.control.extra import Extra
from trimsfs.control.handle import ControlHandle, Recorded, Text, as_json
from trimsfs.control.jobs import Job
from trimsfs.control.reports import Reports
from trimsfs.control.tensor_tables import TensorTables
from trimsfs.control.xattrs import Xattrs
from trimsfs.errors import NoSuchEntryError, NotPermittedError
from trimsfs.namespace.inodes import Inode, InodeKind

log = logging.getLogger(__name__)

REFRESH = "refresh"
SUBJECT = "subject"
"""Marks the inode of ``.trims/NAME``, to tell it from ``.trims`` itself."""
CANCEL = "cancel-"
TRACES = "traces"


class Control:
    """Answers for everything below ``.trims``; ``xattrs`` for ``user.trims.*``.

    ``tells_common``: whether models have a control file ``shared``, for the blocks that they share with others.
    *refresh* makes the next lookup of a path, or of a name below it, ask the store.
    """

    def __init__(
        self,
        xattrs: Xattrs,
        tables: TensorTables,
        commands: Commands,
        extras: Sequence[Extra],
        reports: Reports,
        authorisation: Authorisation,
        *,
        tells_common: bool,
        refresh: Callable[[str], Awaitable[None]],
    ) -> None:
        self.xattrs = xattrs
        self._tables = tables
        self._commands = commands
        self.extras = extras
        self._by_directory = {extra.directory: extra for extra in extras if extra.directory}
        self._reports = reports
        self.authorisation = authorisation
        self.tells_common = tells_common
        self._refresh = refresh
        self._root_files: dict[str, Callable[[Caller], Awaitable[bytes]]] = {
            "control": reports.mount,
            "metrics": reports.metrics,
            "models": partial(reports.models, ""),
            **{name: partial(reports.of_extra, extra) for name, extra in self._by_directory.items()},
        }
        self._switches = {name: switch for extra in extras for name, switch in extra.switches.items()}
        self._traces = reports.traces

    def names(self, inode: Inode) -> list[str]:
        """The names of the control files in a control directory."""
        if inode.control == SUBJECT:
            looks = ["files", "info", "jobs"] if inode.generation is None else ["info", "tensors"]
            if self.tells_common and inode.generation is not None:
                looks.append("shared")
            if inode.generation is not None:
                looks += [name for name, extra in self._by_directory.items() if extra.names()]
            return sorted([*looks, REFRESH, *self._commands.names()])
        if inode.control in self._by_directory:
            return self._by_directory[inode.control].names()
        return sorted([*self._root_files, *self._switches, TRACES]) if not inode.path else []

    def find(self, inode: Inode, name: str) -> tuple[InodeKind, str] | None:
        """Look up a name in a control directory: its kind, and the ``control`` of its inode; None if there is none.

        Some names can be looked up but are not among `names`.
        """
        extra = self._by_directory.get(inode.control)
        if extra is not None:
            return (InodeKind.CONTROL_FILE, f"{inode.control}/{name}") if extra.knows(name) else None
        if inode.control == SUBJECT and inode.generation is not None and name in self._by_directory:
            return InodeKind.CONTROL_DIRECTORY, name
        known = name in self.names(inode)
        if inode.control == SUBJECT and not known:
            known = self._commands.knows(name) or self._job_to_cancel(inode, name) is not None
        return (InodeKind.CONTROL_FILE, name) if known else None

    def _job_to_cancel(self, inode: Inode, name: str) -> Job | None:
        """The job that a control file of a directory cancels; None if there is none."""
        if not name.startswith(CANCEL) or inode.generation is not None:
            return None
        return self._commands.jobs.find(name.removeprefix(CANCEL), inode.path)

    async def open(self, inode: Inode, caller: Caller) -> ControlHandle:
        """Open a control file. Raises NotPermittedError if the caller may not give this command."""
        name = inode.control
        if name == REFRESH:
            self._check_may_command(inode, caller)
            await self._refresh(inode.path)
            return Text(as_json({"path": inode.path, "state": "done"}))
        if self._commands.knows(name):
            self._check_may_command(inode, caller)
            return self._commands.start(name, inode, caller.uid)
        if name.startswith(CANCEL):
            self._check_may_command(inode, caller)
            job = self._job_to_cancel(inode, name)
            if job is None:
                raise NoSuchEntryError(f"no job {name.removeprefix(CANCEL)}: see `trimsfs jobs`")
            return await self._commands.cancel(job)
        if name in self._switches:
            self._check_may_command(inode, caller)
            self._switches[name]()
            return Text(as_json({"state": "done"}))
        directory, _, asked = name.partition("/")
        if directory in self._by_directory and asked:
            assert inode.generation is not None
            return await self._by_directory[directory].open(inode.generation, asked, caller)
        if name == "info":
            return Text(await self._reports.info(inode, caller))
        if name == "files":
            return await self._reports.inventory(inode.path, caller)
        if name == "jobs":
            return Text(self._reports.jobs(inode, caller))
        if name == "tensors":
            assert inode.generation is not None
            table = await self._tables.table(inode.generation)
            return Text(table.content, keep=table)
        if name == "shared":
            return Text(await self._reports.shared(inode, caller))
        if name == TRACES:
            return self._traces(caller)
        return Text(await self._root_files[name](caller))

    def _check_may_command(self, inode: Inode, caller: Caller) -> None:
        if not self.authorisation.may_command(caller):
            raise NotPermittedError(f"{inode.control} /{inode.path}: uid {caller.uid} may not command this mount")

    def assign_handle(self, file: ControlHandle, handle: int) -> None:
        """Record the handle of an open control file."""
        if isinstance(file, Recorded):
            file.record(handle)

    def restored(self, inode: Inode, handle: int) -> ControlHandle | None:
        """Reopen a control file that an earlier server opened; None if it cannot go on."""
        directory, _, asked = inode.control.partition("/")
        return self._by_directory[directory].restored(handle, asked) if directory in self._by_directory else None

    def shows_content(self, name: str) -> bool:
        """Whether a control file or attribute reveals some of its file's content."""
        return name == "tensors" or any(extra.shows_content(name) for extra in self.extras)
